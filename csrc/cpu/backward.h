// The backward. Every row's log-sum-exp is known, so (row block, key block) tiles are visited in one sweep when an item
// has one block of either kind, and otherwise in two: one for dQ and the parameters, one for dK and dV.
#pragma once
#include "dropout.h"
#include "relative.h"

namespace retro_kernels {
namespace RK_NAMESPACE {
namespace {

struct BackwardBuffers {
  // packed: as the broadcast operand, and with pairs adjacent along the keys or rows as the other operand
  float *keys, *keys_across, *values;
  float *query, *query_panels, *query_across;
  float *grad, *grad_panels, *grad_across;
  float *scores, *grad_scores, *bias, *slopes;  // slopes: of the soft cap
  float *p_down, *ds_down, *ds_across;  // pairs along the rows, along the rows, along the keys
  float* p_across = nullptr;            // pairs along the keys, where it is wanted
  float *grad_query, *grad_key, *grad_value;
  float *lse, *log_sum, *delta, *null_grad, *null_key, *null_value, *null_output, *wide, *wide_grad;
  // relative positions: the rows that meet the table, as above, and their gradients
  float *query_relative, *query_relative_panels, *query_relative_across, *grad_query_relative;
  float *content_bias, *relative_bias;
  RelativeBuffers relative;
  uint64_t* kept;

  BackwardBuffers(const Problem& p, const Sizes& z, Arena* arena) : relative(p, z, true, arena) {
    keys = arena->take(z.keys * z.ld);
    keys_across = z.pairs ? arena->take(z.keys / 2 * z.dim) : keys;
    values = arena->take(z.keys * z.ld_value);
    query = arena->take(kRows * z.ld);
    query_across = z.pairs ? arena->take(kRows / 2 * z.dim) : query;
    query_panels = arena->take(kRows * round_up(z.depth, 16));
    grad = arena->take(kRows * z.ld_value);
    grad_across = z.pairs ? arena->take(kRows / 2 * z.dim_value) : grad;
    grad_panels = arena->take(kRows * round_up(z.depth_value, 16));
    scores = arena->take(z.keys * kRows);
    grad_scores = arena->take(z.keys * kRows);
    bias = arena->take(p.bias.data ? z.keys * kRows : 0);
    slopes = p.softcap > 0.0f ? arena->take(z.keys * kRows) : nullptr;
    p_down = z.pairs ? arena->take(z.keys * kRows / 2) : scores;
    ds_down = z.pairs ? arena->take(z.keys * kRows / 2) : grad_scores;
    ds_across = z.pairs ? arena->take(z.keys / 2 * kRows) : grad_scores;
    grad_query = arena->take(kRows * z.dim);
    grad_key = arena->take(z.keys * z.dim);
    grad_value = arena->take(z.keys * z.dim_value);
    lse = arena->take(kRows);
    log_sum = arena->take(p.bias.data ? kRows : 0);
    delta = arena->take(kRows);
    null_grad = arena->take(kRows);  // dS of the null slot
    null_key = arena->take(kMaxDim);
    null_value = arena->take(kMaxDim);
    null_output = arena->take(kMaxDim);  // null_value as a row outputs it that saw nothing else
    wide = arena->take(kMaxDim);
    wide_grad = arena->take(kMaxDim);
    content_bias = arena->take(kMaxDim);
    relative_bias = arena->take(kMaxDim);
    grad_query_relative = arena->take(p.relative_key.data ? kRows * z.dim : 0);
    query_relative = query, query_relative_panels = query_panels, query_relative_across = query_across;
    if (p.content_bias.data || p.relative_bias.data) {
      query_relative = arena->take(kRows * z.ld);
      query_relative_across = z.pairs ? arena->take(kRows / 2 * z.dim) : query_relative;
      query_relative_panels = arena->take(kRows * round_up(z.depth, 16));
    }
    kept = arena->take<uint64_t>(p.dropout ? z.keys : 0);
  }
};

// Packs queries and output gradients of a row block; lse (base 2; with a bias its two planes) and delta; the null slot's
// share of all gradients.
// Rows that saw nothing, whatever they hold, and those that pad the block are packed as zeros with lse +inf: that is
// their mark in here. A row whose logits hold NaN or +inf has lse NaN.
template <class T, bool kPairs>
static void pack_backward_rows(const Problem& p, const Item& item, const Sizes& z, const BackwardBuffers& f,
                               const Rows& rows, bool grad_query, bool parameters, int64_t copy) {
  const float* content_bias = head_vector(p, p.content_bias, rows, f.content_bias);
  const float* relative_bias = head_vector(p, p.relative_bias, rows, f.relative_bias);
  const bool apart = f.query_relative != f.query;
  if (grad_query && p.relative_key.data) __builtin_memset(f.grad_query_relative, 0, (size_t)(kRows * z.dim) * 4);
  const uint64_t null_kept = p.null_key.data && p.dropout ? draw_null(p, rows) : ~(uint64_t)0;
  const float survivor = p.dropout ? p.survivor : 1.0f;
  for (int64_t i = 0; i < rows.padded; ++i) {
    float* query = f.query + i * z.ld;
    float* grad = f.grad + i * z.ld_value;
    float* dq = f.grad_query + i * z.dim;
    if (grad_query && p.null_key.data) __builtin_memset(dq, 0, (size_t)z.dim * 4);
    const int64_t position = i < rows.count ? rows.position[i] : 0;
    if (i >= rows.count || p.lse[position] == -infinity()) {
      __builtin_memset(query, 0, (size_t)(z.ld - 16) * 4);
      if (apart) __builtin_memset(f.query_relative + i * z.ld, 0, (size_t)(z.ld - 16) * 4);
      __builtin_memset(grad, 0, (size_t)(z.ld_value - 16) * 4);
      f.lse[i] = infinity();
      if (p.bias.data) f.log_sum[i] = 0.0f;
      f.delta[i] = 0.0f;
      f.null_grad[i] = 0.0f;
      continue;
    }
    const T* query_row = (const T*)p.query + row_offset(p.query_stride, item, rows, i);
    pack_row<T, kPairs>(query_row, p.dim, &p.query_cos, &p.query_sin, rows.angle[i], p.rotary_width,
                        p.rotary_interleaved, query, z.ld - 16, content_bias);
    if (apart)
      pack_row<T, kPairs>(query_row, p.dim, nullptr, nullptr, 0, 0, false, f.query_relative + i * z.ld, z.ld - 16,
                          relative_bias);
    const T* grad_row = (const T*)p.grad_out + row_offset(p.grad_out_stride, item, rows, i);
    pack_row<T, kPairs>(grad_row, p.dim_value, nullptr, nullptr, 0, 0, false, grad, z.ld_value - 16);
    f.lse[i] = p.bias.data ? p.lse[position] : in_base_2(p.lse[position]);
    if (f.lse[i] == infinity()) f.lse[i] = __builtin_nanf("");
    if (p.bias.data) f.log_sum[i] = p.log_sum[position];
    f.delta[i] = dot(grad_row, (const T*)p.out + position * p.dim_value, p.dim_value);
    if (p.grad_lse) f.delta[i] -= p.grad_lse[position];  // dS = P (dP - delta + dlse)
    f.null_grad[i] = 0.0f;
    if (!p.null_key.data) continue;

    const float* wide_grad = grad;
    if (kPairs) widen_row(grad_row, p.dim_value, f.wide_grad, z.dim_value), wide_grad = f.wide_grad;
    if (i == 0 || rows.head[i] != rows.head[i - 1] || f.lse[i - 1] == infinity()) {
      __builtin_memset(f.null_key, 0, kMaxDim * 4);
      __builtin_memset(f.null_value, 0, kMaxDim * 4);
      widen_operand(p.null_key, rows.head[i] * p.null_key.stride0, p.dim, f.null_key);
      widen_operand(p.null_value, rows.head[i] * p.null_value.stride0, p.dim_value, f.null_value);
      for (int64_t j = 0; j < kMaxDim; ++j) f.null_output[j] = f.null_value[j] * survivor;
    }
    const float* wide_query = query;
    if (kPairs) widen_row((const bfloat_t*)query, p.dim, f.wide, z.dim), wide_query = f.wide;
    const float product = dot(wide_query, f.null_key, z.dim);
    float slope = 1.0f;
    const float logit =
        p.softcap > 0.0f ? cap_logit(p, product * p.scale, &slope) * kLog2e : product * (p.scale * kLog2e);
    const float below = (logit - f.lse[i]) - (p.bias.data ? f.log_sum[i] : 0.0f);
    const float probability = exp2(smaller(vfloat{}, splat(below)))[0];
    const float kept = null_kept >> i & 1 ? survivor : 0.0f;
    const float of_null = kept > 0.0f ? dot(wide_grad, f.null_output, z.dim_value) : 0.0f;
    const float ds = probability * (of_null - f.delta[i]) * slope;
    f.null_grad[i] = ds;
    if (grad_query)
      for (int64_t j = 0; j < z.dim; ++j) dq[j] = ds * f.null_key[j];
    if (parameters && p.null_key_partial) {
      const int64_t at = copy * p.heads + rows.head[i];
      add_scaled(p.null_key_partial + at * p.dim, ds * p.scale, wide_query, p.dim);
      add_scaled(p.null_value_partial + at * p.dim_value, kept * probability, wide_grad, p.dim_value);
    }
  }
  transpose_rows(f.query, z.ld, rows.padded, round_up(z.depth, 16), f.query_panels);
  transpose_rows(f.grad, z.ld_value, rows.padded, round_up(z.depth_value, 16), f.grad_panels);
  interleave_rows<kPairs>(f.query, z.ld, rows.padded, z.dim, f.query_across, z.dim);
  if (apart) {
    transpose_rows(f.query_relative, z.ld, rows.padded, round_up(z.depth, 16), f.query_relative_panels);
    interleave_rows<kPairs>(f.query_relative, z.ld, rows.padded, z.dim, f.query_relative_across, z.dim);
  }
  interleave_rows<kPairs>(f.grad, z.ld_value, rows.padded, z.dim_value, f.grad_across, z.dim_value);
}

// dS of the logits before the cap. Where dS is 0, the slope may be NaN: of what a row does not see.
RK_INLINE vfloat cap_gradient(vfloat ds, vfloat slope) { return ds == vfloat{} ? ds : ds * slope; }

// scores, grad_scores [key][row] -> probabilities and dS, as the three products want them; of these, what is kept wide is
// that of the capped logits. With kIdle, where the block has
// such rows, both are 0 in those that saw nothing or pad it, whatever keys and values hold. With large logits a score may
// be above the log-sum-exp, by their rounding.
template <bool kPairs, bool kKeepWide, bool kDrop, bool kIdle>
static void differentiate_block(const Keys& keys, int64_t padded_rows, float factor, const float* bias,
                                float survivor, const BackwardBuffers& f) {
  const auto terms = [&](int64_t at, int64_t i, vfloat* p, vfloat* ds) __attribute__((always_inline)) {
    const vfloat lse = load(f.lse + i);
    vfloat x = load(f.scores + at) * factor - lse;
    if (bias) x = ((load(f.scores + at) * factor + load(bias + at)) - lse) - load(f.log_sum + i);
    *p = exp2(smaller(vfloat{}, x));
    if constexpr (kIdle) *p = lse == splat(infinity()) ? vfloat{} : *p;
    if constexpr (kDrop) {
      const uint64_t bits = f.kept[at / kRows] >> i;
      *ds = *p * (keep_lanes(load(f.grad_scores + at) * survivor, bits) - load(f.delta + i));
      *p = keep_lanes(*p * survivor, bits);
    } else {
      *ds = *p * (load(f.grad_scores + at) - load(f.delta + i));
    }
    if constexpr (kIdle) *ds = lse == splat(infinity()) ? vfloat{} : *ds;
    if (kKeepWide) store(f.grad_scores + at, *ds);
    if (f.slopes) *ds = cap_gradient(*ds, load(f.slopes + at));
  };
#if RK_LEVEL >= 3
  if constexpr (kPairs) {
    for (int64_t k = 0; k < keys.count; k += 2)
      for (int64_t i = 0; i < padded_rows; i += 32) {
        vfloat p[4] = {}, ds[4] = {};
        const bool second = k + 1 < keys.count, wide = i + 16 < padded_rows;
        terms(k * kRows + i, i, p, ds);
        if (wide) terms(k * kRows + i + 16, i + 16, p + 1, ds + 1);
        if (second) terms((k + 1) * kRows + i, i, p + 2, ds + 2);
        if (second && wide) terms((k + 1) * kRows + i + 16, i + 16, p + 3, ds + 3);
        store_down(p[0], p[1], f.p_down + k * kRows / 2 + i / 2);
        store_down(p[2], p[3], f.p_down + (k + 1) * kRows / 2 + i / 2);
        store_down(ds[0], ds[1], f.ds_down + k * kRows / 2 + i / 2);
        store_down(ds[2], ds[3], f.ds_down + (k + 1) * kRows / 2 + i / 2);
        if (f.p_across) {
          store_pairs(p[0], p[2], f.p_across + k / 2 * kRows + i);
          store_pairs(p[1], p[3], f.p_across + k / 2 * kRows + i + 16);
        }
        store_pairs(ds[0], ds[2], f.ds_across + k / 2 * kRows + i);
        store_pairs(ds[1], ds[3], f.ds_across + k / 2 * kRows + i + 16);
      }
    return;
  }
#endif
  for (int64_t k = 0; k < keys.count; ++k)
    for (int64_t i = 0; i < padded_rows; i += kLanes) {
      vfloat p, ds;
      terms(k * kRows + i, i, &p, &ds);
      store(f.scores + k * kRows + i, p);
      if (!kKeepWide) store(f.grad_scores + k * kRows + i, ds);
    }
}

// The same with the variant that the block needs; `wide`: its dS is kept as fp32, too.
template <bool kPairs>
static void differentiate(const Problem& p, const Keys& keys, const Rows& rows, float factor, const float* bias,
                          bool wide, const BackwardBuffers& f) {
  bool idle = false;
  for (int64_t i = 0; i < rows.padded; ++i) idle |= f.lse[i] == infinity();
  constexpr decltype(&differentiate_block<kPairs, false, false, false>) variants[2][2][2] = {
      {{differentiate_block<kPairs, false, false, false>, differentiate_block<kPairs, false, false, true>},
       {differentiate_block<kPairs, false, true, false>, differentiate_block<kPairs, false, true, true>}},
      {{differentiate_block<kPairs, true, false, false>, differentiate_block<kPairs, true, false, true>},
       {differentiate_block<kPairs, true, true, false>, differentiate_block<kPairs, true, true, true>}}};
  variants[wide][p.dropout][idle](keys, rows.padded, factor, bias, p.survivor, f);
}

static void add_bias_gradient(const Problem& p, const Rows& rows, const Keys& keys, const float* grad_scores,
                              int64_t copy) {
  const BiasRuns runs(p, keys);
  float square[kLanes * kMostKeys] __attribute__((aligned(64)));
  for (int64_t i0 = 0; i0 < rows.padded; i0 += kLanes) {
    for (int64_t k = 0; k < keys.count; k += kLanes)
      transpose_square(grad_scores + k * kRows + i0, kRows, square + k, kMostKeys);
    for (int64_t i = 0; i < kLanes && i0 + i < rows.count; ++i) {
      float* to = p.bias_partial +
                  ((copy * p.heads + rows.head[i0 + i]) * p.table_rows + rows.row[i0 + i]) * p.bias_slots;
      const float* from = square + i * kMostKeys;
      // what the row sees: in a row of NaN the rest is NaN, too
      int64_t seen = keys.count;
      while (p.causal && seen > 0 && keys.slot[seen - 1] > rows.last[i0 + i]) --seen;
      for (int64_t run = 0; run < runs.count && runs.key[run] < seen; ++run)
        add_scaled(to + runs.start[run], 1.0f, from + runs.key[run], least(runs.length[run], seen - runs.key[run]));
    }
  }
}

// One (row block, key block). `add_key`: dK and dV already hold the sum over earlier row blocks.
template <class T, bool kPairs>
static void backward_tile(const Problem& p, const Sizes& z, const BackwardBuffers& f, const Rows& rows,
                          const Keys& keys, bool query_wanted, bool key_wanted, bool add_query, bool add_key,
                          bool parameters, int64_t copy, Prefetch* next) {
  float factor = p.softcap > 0.0f ? kLog2e : p.scale * kLog2e;
  const int64_t row_depth = kPairs ? (rows.count + 1) / 2 : rows.count;
  const int64_t key_depth = kPairs ? (keys.count + 1) / 2 : keys.count;
  const float* bias = p.bias.data ? f.bias : nullptr;
  if (bias) gather_bias(p, rows, keys, f.bias);
  multiply<false, kPairs>(keys.padded, rows.padded, z.depth, f.keys, z.ld, f.query_panels, kPanel,
                          panel_size(z.depth), f.scores, kRows, false, next);
  if (p.relative_key.data)
    add_relative<kPairs>(p, z, rows, keys, f.query_relative_panels, f.relative.band, f.relative.sheared, f.scores, next);
  multiply<false, kPairs>(keys.padded, rows.padded, z.depth_value, f.values, z.ld_value, f.grad_panels, kPanel,
                          panel_size(z.depth_value), f.grad_scores, kRows, false, next);
  if (f.slopes) cap_scores(p, rows.padded, keys.count, f.scores, f.slopes);
  if (partly_hidden(p, rows, keys)) {
    hide_unseen(rows, keys, factor, f.scores);
    factor = 1.0f;
  }
  if (p.dropout) draw_keys(p, rows, keys, f.kept);
  const bool wide = parameters && (p.bias_partial || p.relative_key.data);
  differentiate<kPairs>(p, keys, rows, factor, bias, wide, f);
  if (parameters && p.bias_partial) add_bias_gradient(p, rows, keys, f.grad_scores, copy);
  if (wide && f.slopes)  // the bias is added after the cap; all else is before it
    for (int64_t at = 0; at < keys.count * kRows; at += kLanes)
      store(f.grad_scores + at, cap_gradient(load(f.grad_scores + at), load(f.slopes + at)));
  if (parameters && p.relative_key.data)
    add_relative_gradients<kPairs>(p, z, f.relative, rows, keys, f.grad_scores, f.query_relative_across,
                                   f.grad_query_relative, copy, next);
  const int64_t ld_scores = kPairs ? kRows / 2 : kRows;
  if (keys.count < keys.all) {  // what pads the keys are keys, which these rows do not see
    const size_t bytes = (size_t)((keys.padded - keys.count) * ld_scores) * 4;
    __builtin_memset(f.p_down + keys.count * ld_scores, 0, bytes);
    __builtin_memset(f.ds_down + keys.count * ld_scores, 0, bytes);
  }
  if (key_wanted) {
    multiply<false, kPairs>(keys.padded, z.dim_value, row_depth, f.p_down, ld_scores, f.grad_across,
                            kPairs ? z.dim_value : z.ld_value, kPanel, f.grad_value, z.dim_value, add_key, next);
    multiply<false, kPairs>(keys.padded, z.dim, row_depth, f.ds_down, ld_scores, f.query_across,
                            kPairs ? z.dim : z.ld, kPanel, f.grad_key, z.dim, add_key, next);
  }
  if (query_wanted)
    multiply<true, kPairs>(rows.padded, z.dim, key_depth, f.ds_across, kRows, f.keys_across, kPairs ? z.dim : z.ld,
                           kPanel, f.grad_query, z.dim, add_query, next);
}

RK_INLINE int64_t gradient_row(const Problem& p, const Item& item, int64_t slot) {
  return (((item.b * p.chunks + item.chunk) * p.neighbours + item.neighbour) * p.retrieved + slot) * p.kv_heads + item.kv;
}

template <class T>
static void write_keys(const Problem& p, const Item& item, const Sizes& z, const BackwardBuffers& f,
                       const Keys& keys) {
  for (int64_t i = 0; i < keys.all; ++i) {
    const int64_t at = gradient_row(p, item, keys.slot[i]);
    float* dk = f.grad_key + i * z.dim;
    if (p.rotary_width > 0)
      rotate(dk, p.key_cos, p.key_sin, key_angle(p, item, keys.slot[i]), p.rotary_width, p.rotary_interleaved, -1.0f);
    if (p.stream_gradients) {
      stream_row(dk, p.dim, p.scale, (T*)p.grad_key + at * p.dim);
      stream_row(f.grad_value + i * z.dim_value, p.dim_value, 1.0f, (T*)p.grad_value + at * p.dim_value);
    } else {
      narrow_row(dk, p.dim, p.scale, (T*)p.grad_key + at * p.dim);
      narrow_row(f.grad_value + i * z.dim_value, p.dim_value, 1.0f, (T*)p.grad_value + at * p.dim_value);
    }
  }
#if RK_LEVEL >= 2
  if (p.stream_gradients) _mm_sfence();
#endif
}

// Sums up u's and v's gradients, and adds the table's share of dQ to the keys'.
static void join_relative(const Problem& p, const Sizes& z, const BackwardBuffers& f, const Rows& rows, int64_t copy) {
  const auto add_columns = [&](float* partial, const float* gradients) {
    if (!partial) return;
    partial += (copy * p.heads + rows.head[0]) * p.dim;
    for (int64_t i = 0; i < rows.count; ++i)
      if (f.lse[i] != infinity()) add_scaled(partial, p.scale, gradients + i * z.dim, p.dim);
  };
  add_columns(p.content_bias_partial, f.grad_query);
  add_columns(p.relative_bias_partial, f.grad_query_relative);
  add_scaled(f.grad_query, 1.0f, f.grad_query_relative, rows.count * z.dim);
}

template <class T>
static void write_queries(const Problem& p, const Sizes& z, const BackwardBuffers& f, const Rows& rows, bool computed) {
  for (int64_t i = 0; i < rows.count; ++i) {
    T* out = (T*)p.grad_query + rows.position[i] * p.dim;
    float* dq = f.grad_query + i * z.dim;
    // a row that saw nothing gets exactly 0 even when the keys of others hold NaN
    if (!computed || f.lse[i] == infinity()) {
      __builtin_memset((void*)out, 0, (size_t)p.dim * sizeof(T));
      continue;
    }
    if (p.rotary_width > 0)
      rotate(dq, p.query_cos, p.query_sin, rows.angle[i], p.rotary_width, p.rotary_interleaved, -1.0f);
    narrow_row(dq, p.dim, p.scale, out);
  }
}

template <class T>
static void clear_hidden_keys(const Problem& p, const Item& item) {
  const uint8_t* mask = nullptr;
  if (p.mask)
    mask = p.mask + item.b * p.mask_stride[0] + item.chunk * p.mask_stride[1] + item.neighbour * p.mask_stride[2];
  if (!mask && item.count > 0) return;
  for (int64_t s = 0; s < item.slots; ++s) {
    if (item.count > 0 && mask[s / p.retrieved * p.mask_stride[2] + s % p.retrieved * p.mask_stride[3]]) continue;
    const int64_t at = gradient_row(p, item, s);
    __builtin_memset((void*)((T*)p.grad_key + at * p.dim), 0, (size_t)p.dim * sizeof(T));
    __builtin_memset((void*)((T*)p.grad_value + at * p.dim_value), 0, (size_t)p.dim_value * sizeof(T));
  }
}

template <class T, bool kPairs>
static void pack_backward_keys(const Problem& p, const Item& item, const Sizes& z, const BackwardBuffers& f,
                               const Keys& keys) {
  pack_keys<T, kPairs>(p, item, z, keys, f.keys);
  pack_values<T, kPairs>(p, item, z, keys, f.values);
  interleave_rows<kPairs>(f.keys, z.ld, keys.padded, z.dim, f.keys_across, z.dim);
}

template <class T, bool kPairs>
static void backward_typed(const Problem& p, int64_t index, int64_t following, int64_t copy, char* scratch) {
  const Sizes z(p, kPairs);
  Arena arena{scratch};
  const BackwardBuffers f(p, z, &arena);
  const Item item = item_at(p, index);
  clear_hidden_keys<T>(p, item);
  if (item.count == 0) return;
  const int64_t slots = item.slots, blocks = row_blocks(p, item);
  const bool one_sweep = slots <= z.keys || blocks == 1;
  const bool null_slot = p.null_key.data != nullptr;
  Rows rows;
  Keys keys;
  Prefetch ahead;
  const int64_t tiles = 2 * (least(slots, z.keys) / kTileRows * kRows / kPanel) +
                        least(slots, z.keys) / kTileRows * (z.dim + z.dim_value) / kPanel +
                        kRows / kTileRows * z.dim / kPanel + 1;

  // Row blocks outside: dQ, the parameters, and with a single row block dK and dV as well.
  if (slots > z.keys) {
    for (int64_t block = 0; block < blocks; ++block) {
      make_rows(p, item, block, &rows);
      pack_backward_rows<T, kPairs>(p, item, z, f, rows, true, true, copy);
      bool started = null_slot;
      for (int64_t cursor = rows.begin; cursor < rows.end;) {
        next_keys(p, item, z.keys, &cursor, rows.end, &keys);
        if (keys.count == 0) break;
        pack_backward_keys<T, kPairs>(p, item, z, f, keys);
        if (cursor < rows.end)
          ahead = make_prefetch<T>(p, item, cursor, -1, z, tiles, true);
        else if (block + 1 < blocks)
          ahead = make_prefetch<T>(p, item, 0, block + 1, z, tiles, true);
        else if (one_sweep && following >= 0)
          ahead = make_prefetch<T>(p, item_at(p, following), 0, 0, z, tiles, true);
        backward_tile<T, kPairs>(p, z, f, rows, keys, true, one_sweep, started, false, true, copy,
                                  &ahead);
        if (one_sweep) write_keys<T>(p, item, z, f, keys);
        started = true;
      }
      if (started && p.relative_key.data) join_relative(p, z, f, rows, copy);
      write_queries<T>(p, z, f, rows, started);
    }
    if (one_sweep) return;
  }

  // Key blocks outside: dK and dV, and with a single key block everything.
  int64_t cursor = 0;
  do {
    next_keys(p, item, z.keys, &cursor, slots, &keys);
    if (keys.count == 0 && !one_sweep) break;
    pack_backward_keys<T, kPairs>(p, item, z, f, keys);
    if (p.causal) {  // no row block sees all keys
      __builtin_memset(f.grad_key, 0, (size_t)(keys.padded * z.dim) * 4);
      __builtin_memset(f.grad_value, 0, (size_t)(keys.padded * z.dim_value) * 4);
    }
    for (int64_t block = 0; block < blocks; ++block) {
      make_rows(p, item, block, &rows);
      keep_below(rows.end, &keys);
      const bool seen = keys.count > 0 && keys.slot[keys.count - 1] >= rows.begin;
      if (!seen && !one_sweep) continue;
      pack_backward_rows<T, kPairs>(p, item, z, f, rows, one_sweep, one_sweep, copy);
      if (block + 1 < blocks)
        ahead = make_prefetch<T>(p, item, -1, block + 1, z, tiles, true);
      else if (cursor >= slots && following >= 0)
        ahead = make_prefetch<T>(p, item_at(p, following), 0, 0, z, tiles, true);
      if (seen)
        backward_tile<T, kPairs>(p, z, f, rows, keys, one_sweep, true, null_slot, p.causal || block > 0, one_sweep,
                                 copy, &ahead);
      if (!one_sweep) continue;
      if ((null_slot || seen) && p.relative_key.data) join_relative(p, z, f, rows, copy);
      write_queries<T>(p, z, f, rows, null_slot || seen);
    }
    write_keys<T>(p, item, z, f, keys);
  } while (cursor < slots);
}

static void backward(const Problem& p, int64_t item, int64_t following, int64_t copy, char* scratch) {
  [[maybe_unused]] const TileRegisters registers;
  if (p.type == kFloat32)
    backward_typed<float, false>(p, item, following, copy, scratch);
  else if (p.type == kFloat16)
    backward_typed<half_t, false>(p, item, following, copy, scratch);
  else
    backward_typed<bfloat_t, (RK_LEVEL >= 3)>(p, item, following, copy, scratch);
}

}  // namespace
}  // namespace RK_NAMESPACE
}  // namespace retro_kernels
