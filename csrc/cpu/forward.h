// The forward: an online softmax over the key blocks of every row block.
#pragma once
#include "dropout.h"
#include "relative.h"

namespace retro_kernels {
namespace RK_NAMESPACE {
namespace {

struct ForwardBuffers {
  float *keys, *values, *raw, *rows, *scores, *probabilities, *bias, *out;
  float *highest, *sum, *rescale, *log_sum;
  float *null_value, *null_key, *wide;
  float *rows_relative, *content_bias, *relative_bias;  // rows_relative: the rows that meet the table of distances
  RelativeBuffers relative;
  uint64_t* kept;

  ForwardBuffers(const Problem& p, const Sizes& z, Arena* arena) : relative(p, z, false, arena) {
    keys = arena->take(z.keys * z.ld);
    values = arena->take(z.pairs ? z.keys / 2 * z.dim_value : z.keys * z.ld_value);
    raw = arena->take(most(kRows * z.ld, z.pairs ? z.keys * z.ld_value : 0));
    rows = arena->take(kRows * round_up(z.depth, 16));
    scores = arena->take(z.keys * kRows);
    probabilities = z.pairs ? arena->take(z.keys / 2 * kRows) : scores;
    bias = arena->take(p.bias.data ? z.keys * kRows : 0);
    out = arena->take(kRows * z.dim_value);
    highest = arena->take(kRows);
    sum = arena->take(kRows);
    rescale = arena->take(kRows);
    log_sum = arena->take(kRows);
    null_key = arena->take(kMaxDim);
    null_value = arena->take(kMaxDim);
    wide = arena->take(kMaxDim);
    content_bias = arena->take(kMaxDim);
    relative_bias = arena->take(kMaxDim);
    rows_relative = p.content_bias.data || p.relative_bias.data ? arena->take(kRows * round_up(z.depth, 16)) : rows;
    kept = arena->take<uint64_t>(p.dropout ? z.keys : 0);
  }
};

// The rows' maximum where it may be +inf: NaN where a logit is NaN as well. `before` and `sum` are those of the keys
// before, `scores` has this block's.
RK_INLINE vfloat unless_nan(const Keys& keys, const float* scores, vfloat before, vfloat sum, vfloat high) {
  const vint unbounded = high == splat(infinity());
  if (!any_lane(unbounded)) return high;
  vint nan = (sum != sum) & (before != splat(infinity()));
  for (int64_t k = 0; k < keys.count; ++k) nan |= load(scores + k * kRows) != load(scores + k * kRows);
  return unbounded & nan ? splat(__builtin_nanf("")) : high;
}

// Scores [key][row] -> unnormalised probabilities relative to the running maximum, which this updates with the sum;
// with kDrop zero where a key is not kept, which the sum does not see. The scores in base 2 are stored, rounded, before
// the maximum is subtracted: it is one of them, so that no difference is above 0 and one is 0, however large they are.
// A NaN score is not seen by the maximum, and makes the sum NaN.
template <bool kPairs, bool kDrop>
static void softmax_block(const Keys& keys, int64_t padded_rows, float factor, const float* bias, float* scores,
                          float* probabilities, float* highest, float* sum, float* rescale, const uint64_t* kept) {
  const int64_t n = keys.count;
  for (int64_t i = 0; i < padded_rows; i += kLanes) {
    float* s = scores + i;
    vfloat high = load(highest + i), high1 = high;
    const vfloat before = high;
    int64_t k = 0;
    if (bias) {
      for (; k < n; ++k) {
        const vfloat x = load(s + k * kRows) * factor + load(bias + k * kRows + i);
        store(s + k * kRows, x);
        high = larger(x, high);
      }
    } else {
      for (; k + 2 <= n; k += 2) {
        const vfloat x = load(s + k * kRows) * factor, y = load(s + (k + 1) * kRows) * factor;
        store(s + k * kRows, x);
        store(s + (k + 1) * kRows, y);
        high = larger(x, high);
        high1 = larger(y, high1);
      }
      if (k < n) {
        const vfloat x = load(s + k * kRows) * factor;
        store(s + k * kRows, x);
        high = larger(x, high);
      }
      high = larger(high1, high);
    }
    high = unless_nan(keys, s, before, load(sum + i), high);
    store(highest + i, high);
    const vint nothing = high == splat(-infinity());
    const vfloat reference = nothing ? vfloat{} : high;
    const vfloat alpha = exp2(before - reference);
    store(rescale + i, alpha);
    vfloat total = {}, total1 = {};
    k = 0;
    for (; k + 2 <= n; k += 2) {
      vfloat a = exp2(load(s + k * kRows) - reference);
      vfloat b = exp2(load(s + (k + 1) * kRows) - reference);
      total += a;
      total1 += b;
      if constexpr (kDrop) a = keep_lanes(a, kept[k] >> i), b = keep_lanes(b, kept[k + 1] >> i);
#if RK_LEVEL >= 3
      if constexpr (kPairs) {
        store_pairs(a, b, probabilities + k / 2 * kRows + i);
        continue;
      }
#endif
      store(probabilities + k * kRows + i, a);
      store(probabilities + (k + 1) * kRows + i, b);
    }
    if (k < n) {
      vfloat a = exp2(load(s + k * kRows) - reference);
      total += a;
      if constexpr (kDrop) a = keep_lanes(a, kept[k] >> i);
#if RK_LEVEL >= 3
      if constexpr (kPairs)
        store_pairs(a, vfloat{}, probabilities + k / 2 * kRows + i);
      else
#endif
        store(probabilities + k * kRows + i, a);
    }
    store(sum + i, load(sum + i) * alpha + (total + total1));
  }
}

// What a row's weighted sum is multiplied by: NaN where a logit is NaN or +inf.
RK_INLINE float normaliser(const Problem& p, float highest, float sum) {
  return (p.dropout ? p.survivor : 1.0f) / sum + (highest - highest);
}

// The rows of a block into `f.rows`, and into `f.rows_relative` where those differ. With a null slot also, one row after
// the other, into `f.raw`.
template <class T, bool kPairs>
static void pack_query_rows(const Problem& p, const Item& item, const Sizes& z, const ForwardBuffers& f,
                            const Rows& rows) {
  const float* content_bias = head_vector(p, p.content_bias, rows, f.content_bias);
  const float* relative_bias = head_vector(p, p.relative_bias, rows, f.relative_bias);
  // The null slot needs the rows themselves with the content bias; the table of distances then needs others.
  const float* const packed_bias = p.null_key.data ? content_bias : nullptr;
  const int64_t depth = round_up(z.depth, 16);
  const auto pack = [&](const float* added, float* panels) {
    // Rows of one run lie evenly spaced; as they are, they need no copy before they are transposed.
    const int64_t step = p.query_stride[3] * (int64_t)sizeof(T);
    const bool as_they_are = (kPairs || sizeof(T) == 4) && depth * (kPairs ? 2 : 1) == p.dim && step % 4 == 0 &&
                             p.rotary_width == 0 && !p.null_key.data;
    for (int64_t i = 0; i < rows.padded; i += kLanes) {
      const int64_t last = i + kLanes - 1;
      float* to = panels + i / kPanel * panel_size(z.depth) + i % kPanel;
      if (as_they_are && last < rows.count && rows.head[i] == rows.head[last] &&
          rows.neighbour[i] == rows.neighbour[last]) {
        const T* source = (const T*)p.query + row_offset(p.query_stride, item, rows, i);
        for (int64_t j = 0; j < depth; j += kLanes)
          transpose_square((const float*)source + j, step / 4, to + j * kPanel, kPanel);
        continue;
      }
      for (int64_t x = i; x <= last; ++x) {
        if (x < rows.count)
          pack_row<T, kPairs>((const T*)p.query + row_offset(p.query_stride, item, rows, x), p.dim, &p.query_cos,
                              &p.query_sin, rows.angle[x], p.rotary_width, p.rotary_interleaved, f.raw + x * z.ld,
                              z.ld - 16, added);
        else
          __builtin_memset(f.raw + x * z.ld, 0, (size_t)z.ld * 4);
      }
      for (int64_t j = 0; j < depth; j += kLanes)
        transpose_square(f.raw + i * z.ld + j, z.ld, to + j * kPanel, kPanel);
    }
  };
  if (f.rows_relative == f.rows) return pack(nullptr, f.rows);
  pack(nullptr, f.rows_relative);
  if (packed_bias)
    pack(packed_bias, f.rows);
  else if (content_bias)
    add_to_panels<kPairs>(f.rows_relative, content_bias, rows.padded, p.dim, z.depth, f.rows);
  else
    pack(nullptr, f.rows);
  if (relative_bias) add_to_panels<kPairs>(f.rows_relative, relative_bias, rows.padded, p.dim, z.depth, f.rows_relative);
}

template <class T, bool kPairs>
static void forward_items(const Problem& p, const Sizes& z, const ForwardBuffers& f, int64_t first_item,
                          int64_t last_item) {
  const int64_t slots = item_at(p, first_item).slots;
  const bool one_block = slots <= z.keys;
  const float factor = p.softcap > 0.0f ? kLog2e : p.scale * kLog2e;
  Rows rows;
  Keys keys;
  Prefetch ahead;
  Prefetch* const next = &ahead;
  const int64_t tiles = least(slots, z.keys) / kTileRows * kRows / kPanel + kRows / kTileRows * z.dim_value / kPanel + 1;
  for (int64_t index = first_item; index < last_item; ++index) {
    const Item item = item_at(p, index);
    if (item.count == 0) continue;
    const int64_t blocks = row_blocks(p, item);
    for (int64_t block = 0; block < blocks; ++block) {
      make_rows(p, item, block, &rows);
      pack_query_rows<T, kPairs>(p, item, z, f, rows);
      bool started = p.null_key.data != nullptr;
      const uint64_t null_kept = started && p.dropout ? draw_null(p, rows) : ~(uint64_t)0;
      for (int64_t i = 0; i < rows.padded; ++i) {
        f.highest[i] = -infinity();
        f.sum[i] = 0.0f;
        if (!started) continue;
        float* out = f.out + i * z.dim_value;
        if (i >= rows.count) {
          __builtin_memset(out, 0, (size_t)z.dim_value * 4);
          continue;
        }
        if (i == 0 || rows.head[i] != rows.head[i - 1]) {
          __builtin_memset(f.null_key, 0, kMaxDim * 4);
          __builtin_memset(f.null_value, 0, kMaxDim * 4);
          widen_operand(p.null_key, rows.head[i] * p.null_key.stride0, p.dim, f.null_key);
          widen_operand(p.null_value, rows.head[i] * p.null_value.stride0, p.dim_value, f.null_value);
        }
        const float* q = f.raw + i * z.ld;
        if (kPairs) widen_row((const bfloat_t*)q, p.dim, f.wide, z.dim), q = f.wide;
        const float product = dot(q, f.null_key, z.dim);
        f.highest[i] = p.softcap > 0.0f ? cap_logit(p, product * p.scale) * kLog2e : product * factor;
        f.sum[i] = f.highest[i] == -infinity() ? 0.0f : 1.0f;
        if (null_kept >> i & 1)
          __builtin_memcpy(out, f.null_value, (size_t)z.dim_value * 4);
        else
          __builtin_memset(out, 0, (size_t)z.dim_value * 4);
      }

      int64_t cursor = one_block ? 0 : rows.begin;
      const int64_t end = one_block ? slots : rows.end;
      do {
        if (!one_block || block == 0) {
          next_keys(p, item, z.keys, &cursor, end, &keys);
          pack_keys<T, kPairs>(p, item, z, keys, f.keys);
          if (kPairs && p.dim_value % 16 == 0) {
            interleave_values<T, kPairs>(p, item, z, keys, f.values);
          } else if (kPairs) {
            pack_values<T, kPairs>(p, item, z, keys, f.raw);
            interleave_rows<kPairs>(f.raw, z.ld_value, keys.padded, z.dim_value, f.values, z.dim_value);
          } else {
            pack_values<T, kPairs>(p, item, z, keys, f.values);
          }
        } else {
          cursor = end;
        }
        if (one_block) keep_below(rows.end, &keys);
        if (keys.count == 0) break;
        if (p.bias.data) gather_bias(p, rows, keys, f.bias);
        if (cursor < end)
          ahead = make_prefetch<T>(p, item, cursor, -1, z, tiles, false);
        else if (block + 1 < blocks)
          ahead = make_prefetch<T>(p, item, one_block ? -1 : 0, block + 1, z, tiles, false);
        else if (index + 1 < last_item)
          ahead = make_prefetch<T>(p, item_at(p, index + 1), 0, 0, z, tiles, false);
        multiply<false, kPairs>(keys.padded, rows.padded, z.depth, f.keys, z.ld, f.rows, kPanel, panel_size(z.depth),
                                f.scores, kRows, false, next);
        if (p.relative_key.data)
          add_relative<kPairs>(p, z, rows, keys, f.rows_relative, f.relative.band, f.relative.sheared, f.scores, next);
        if (p.softcap > 0.0f) cap_scores(p, rows.padded, keys.count, f.scores, nullptr);
        const bool hidden = partly_hidden(p, rows, keys);
        if (hidden) hide_unseen(rows, keys, factor, f.scores);
        const auto softmax = p.dropout ? softmax_block<kPairs, true> : softmax_block<kPairs, false>;
        if (p.dropout) draw_keys(p, rows, keys, f.kept);
        softmax(keys, rows.padded, hidden ? 1.0f : factor, p.bias.data ? f.bias : nullptr, f.scores, f.probabilities,
                f.highest, f.sum, f.rescale, f.kept);
        if (started)
          for (int64_t i = 0; i < rows.padded; ++i) {
            const float alpha = f.rescale[i];
            float* out = f.out + i * z.dim_value;
            for (int64_t j = 0; j < z.dim_value; j += kLanes) store(out + j, load(out + j) * alpha);
          }
        multiply<true, kPairs>(rows.padded, z.dim_value, kPairs ? (keys.count + 1) / 2 : keys.count, f.probabilities,
                               kRows, f.values, kPairs ? z.dim_value : z.ld_value, kPanel, f.out, z.dim_value, started,
                               next);
        started = true;
      } while (cursor < end);

      float *const lse = f.rescale, *const log_sum = p.log_sum ? f.log_sum : nullptr;
      log_sum_exp(rows.padded, f.highest, f.sum, lse, log_sum);
      for (int64_t i = 0; i < rows.count; ++i) {
        const int64_t position = rows.position[i];
        T* out = (T*)p.out + position * p.dim_value;
        const float sum = f.sum[i];
        if (!started || sum == 0.0f) {
          __builtin_memset((void*)out, 0, (size_t)p.dim_value * sizeof(T));
          p.lse[position] = -infinity();
          if (log_sum) p.log_sum[position] = 0.0f;
        } else {
          narrow_row(f.out + i * z.dim_value, p.dim_value, normaliser(p, f.highest[i], sum), out);
          p.lse[position] = lse[i];
          if (log_sum) p.log_sum[position] = log_sum[i];
        }
      }
    }
  }
}

template <class T, bool kPairs>
static void forward_typed(const Problem& p, int64_t first_item, int64_t last_item, char* scratch) {
  const Sizes z(p, kPairs);
  Arena arena{scratch};
  const ForwardBuffers buffers(p, z, &arena);
  forward_items<T, kPairs>(p, z, buffers, first_item, last_item);
}

static void forward(const Problem& p, int64_t first_item, int64_t last_item, char* scratch) {
  [[maybe_unused]] const TileRegisters registers;
  if (p.type == kFloat32)
    forward_typed<float, false>(p, first_item, last_item, scratch);
  else if (p.type == kFloat16)
    forward_typed<half_t, false>(p, first_item, last_item, scratch);
  else
    forward_typed<bfloat_t, (RK_LEVEL >= 3)>(p, first_item, last_item, scratch);
}

}  // namespace
}  // namespace RK_NAMESPACE
}  // namespace retro_kernels
