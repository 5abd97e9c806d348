// The absorbed forward: keys and values never exist. With E the states of a chunk, for every head
//
//   A = Wk' Q'    S' = E A    softmax down S'    G = E' P'    O' = Wv G      (all with rows down the lanes)
//
// A block of states is packed once for all heads that a thread computes of one chunk, a head's weights once for all its
// rows. Everything that is broadcast lies in blocks of kWide columns, so that a register tile walks a few KiB.
// The biases of the projections are two more columns: of ones in E, bias_key and zeros in Wk, bias_value and zeros in
// Wv. What a row's bias adds is the same for all slots and may be large beside their differences, so that what rounding
// to bf16 leaves of it goes into the second column.
#pragma once
#include "forward.h"

namespace retro_kernels {
namespace RK_NAMESPACE {
namespace {

constexpr int64_t kWide = 128;
constexpr int64_t kWideLd = kWide + 16;  // not a multiple of 512 bytes: rows of a block spread over the L1's sets

struct AbsorbedSizes {
  Sizes z;
  int64_t width, all, padded;      // e; with the columns of biases; that to 16
  int64_t down, straight;          // blocks along the width: of columns, and of elements summed over

  AbsorbedSizes(const Absorbed& a, bool pairs) : z(a.p, pairs) {
    z.keys = absorbed_key_block(a.width);
    width = a.width;
    all = absorbed_columns(a);
    padded = round_up(all, 16);
    down = (padded + kWide - 1) / kWide;
    straight = ((pairs ? padded / 2 : padded) + kWide - 1) / kWide;
  }
};

// A packed matrix: `across` serves products that sum over the width, `down` those that sum over the rows. With pairs
// they differ in which neighbours are paired.
struct Packed {
  float *across, *down;
  int64_t across_block, down_block;

  Packed(const AbsorbedSizes& s, int64_t rows, bool want_across, bool want_down, Arena* arena) {
    rows = round_up(rows, 8);
    across_block = rows * kWideLd;
    down_block = (s.z.pairs ? rows / 2 : rows) * kWideLd;
    across = down = nullptr;
    if (!s.z.pairs) {
      across = down = arena->take(s.down * across_block);
      return;
    }
    if (want_across) across = arena->take(s.straight * across_block);
    if (want_down) down = arena->take(s.down * down_block);
  }
};

struct AbsorbedBuffers {
  ForwardBuffers f;
  Packed states, w_key, w_value;
  float *line, *absorbed, *staging, *gathered, *gathered_pairs, *probabilities, *out, *null_logit;

  AbsorbedBuffers(const Absorbed& a, const AbsorbedSizes& s, Arena* arena)
      : f(a.p, s.z, arena), states(s, s.z.keys, true, true, arena), w_key(s, a.p.dim, false, true, arena),
        w_value(s, a.p.dim_value, true, false, arena) {
    line = arena->take(2 * (s.padded + 32));
    const int64_t size = kRows * (s.padded + 16);
    staging = arena->take(size);
    absorbed = s.z.pairs ? arena->take(size / 2) : staging;
    gathered = arena->take(size);
    gathered_pairs = s.z.pairs ? arena->take(size / 2) : gathered;
    probabilities = arena->take(s.z.keys * kRows);
    out = arena->take(kRows * s.z.dim_value);
    null_logit = arena->take(kRows);
  }
};

// `row(i)` is where row i begins, `last(i, c)` what its column c of biases holds.
template <class T, bool kPairs, class Row, class Last>
RK_INLINE void pack_matrix(const AbsorbedSizes& s, int64_t rows, const Packed& to, float* line, Row row, Last last) {
  if constexpr (kPairs) {
    bfloat_t* lines[2] = {(bfloat_t*)line, (bfloat_t*)(line + s.padded / 2 + 16)};
    for (int64_t i = 0; i < round_up(rows, 8); i += 2) {
      for (int64_t j = 0; j < 2; ++j) {
        bfloat_t* x = lines[j];
        int64_t n = 0;
        if (i + j < rows) {
          n = s.width;
          __builtin_memcpy(x, row(i + j), (size_t)n * 2);
          for (int64_t c = 0; n < s.all; ++c, ++n) narrow(last(i + j, c), x + n);
        }
        __builtin_memset((void*)(x + n), 0, (size_t)(s.padded - n) * 2);
        if (to.across)
          for (int64_t w = 0; w < s.padded; w += 2 * kWide)
            __builtin_memcpy(to.across + w / (2 * kWide) * to.across_block + (i + j) * kWideLd, x + w,
                             (size_t)least(2 * kWide, s.padded - w) * 2);
      }
#if RK_LEVEL >= 3
      if (to.down)
        for (int64_t w = 0; w < s.padded; w += kWide)
          interleave(lines[0] + w, lines[1] + w, least(kWide, s.padded - w),
                     to.down + w / kWide * to.down_block + i / 2 * kWideLd);
#endif
    }
  } else {
    for (int64_t i = 0; i < round_up(rows, 8); ++i) {
      if (i < rows) {
        widen_row((const T*)row(i), s.width, line, s.padded);
        for (int64_t c = 0; s.width + c < s.all; ++c) line[s.width + c] = last(i, c);
      } else {
        __builtin_memset(line, 0, (size_t)s.padded * 4);
      }
      for (int64_t w = 0; w < s.padded; w += kWide)
        __builtin_memcpy(to.across + w / kWide * to.across_block + i * kWideLd, line + w,
                         (size_t)least(kWide, s.padded - w) * 4);
    }
  }
}

// C[row][columns] (+)= A B, summed over `depth` elements of the width. B is in panels of kPanel columns.
template <bool kPairs>
RK_INLINE void multiply_across(const Packed& a, int64_t rows, int64_t depth, const float* b, int64_t panel_b,
                               int64_t columns, float* c, int64_t panel_c, int64_t ldc) {
  Prefetch none;
  for (int64_t k = 0; k < depth; k += kWide)
    for (int64_t x = 0; x < columns; x += kPanel) {
      const float* at = a.across + k / kWide * a.across_block;
      const float* from = b + x / kPanel * panel_b + k * kPanel;
      float* to = c + x / kPanel * panel_c;
      const int64_t vectors = least(columns - x, kPanel) / kLanes, n = least(kWide, depth - k);
      if (k > 0)
        multiply_strip<false, kPairs, true>(rows, vectors, n, at, kWideLd, from, kPanel, 0, to, ldc, &none);
      else
        multiply_strip<false, kPairs, false>(rows, vectors, n, at, kWideLd, from, kPanel, 0, to, ldc, &none);
    }
}

// C[column of the width][columns] (+)= A' B, summed over `depth` rows of A. B and C are in panels, B's rows `ldb` apart.
template <bool kPairs>
RK_INLINE void multiply_down(const Packed& a, int64_t width, int64_t depth, const float* b, int64_t panel_b, int64_t ldb,
                             int64_t columns, float* c, int64_t panel_c, bool add) {
  Prefetch none;
  for (int64_t w = 0; w < width; w += kWide)
    for (int64_t k = 0; k < depth; k += kDepth)
      for (int64_t x = 0; x < columns; x += kPanel) {
        const float* at = a.down + w / kWide * a.down_block + k * kWideLd;
        const float* from = b + x / kPanel * panel_b + k * ldb;
        float* to = c + x / kPanel * panel_c + w * kPanel;
        const int64_t vectors = least(columns - x, kPanel) / kLanes, n = least(kDepth, depth - k);
        const int64_t rows = least(kWide, width - w);
        if (add || k > 0)
          multiply_strip<true, kPairs, true>(rows, vectors, n, at, kWideLd, from, ldb, 0, to, kPanel, &none);
        else
          multiply_strip<true, kPairs, false>(rows, vectors, n, at, kWideLd, from, ldb, 0, to, kPanel, &none);
      }
}

// fp32 panels [row][kPanel] to panels of pairs of rows.
template <bool kPairs>
RK_INLINE void pair_rows(int64_t rows, int64_t columns, const float* from, int64_t panel_from, float* to,
                         int64_t panel_to) {
#if RK_LEVEL >= 3
  if constexpr (kPairs)
    for (int64_t x = 0; x < columns; x += kLanes)
      for (int64_t j = 0; j < rows; j += 2) {
        const float* a = from + x / kPanel * panel_from + j * kPanel + x % kPanel;
        store_pairs(load(a), load(a + kPanel), to + x / kPanel * panel_to + j / 2 * kPanel + x % kPanel);
      }
#endif
}

// The same of products with weights, whose two rows of biases are one number a column, in two parts.
template <bool kPairs>
RK_INLINE void pair_absorbed(const AbsorbedSizes& s, int64_t columns, float* from, int64_t panel_from, float* to,
                             int64_t panel_to) {
  if (kPairs && s.all > s.width)
    for (int64_t x = 0; x < columns; ++x) {
      float* at = from + x / kPanel * panel_from + s.width * kPanel + x % kPanel;
      bfloat_t high;
      narrow(at[0], &high);
      at[kPanel] = at[0] - widen(high);
    }
  pair_rows<kPairs>(round_up(s.all, 2), columns, from, panel_from, to, panel_to);
}

template <class T, bool kPairs>
static void pack_states(const Absorbed& a, const AbsorbedSizes& s, const Packed& states, float* line, const Item& item,
                        const Keys& keys) {
  const T* start = (const T*)a.encoded + item.b * a.encoded_stride[0] + item.chunk * a.encoded_stride[1];
  pack_matrix<T, kPairs>(
      s, keys.count, states, line,
      [&](int64_t i) {
        return start + keys.slot[i] / a.p.retrieved * a.encoded_stride[2] + keys.slot[i] % a.p.retrieved * a.encoded_stride[3];
      },
      [](int64_t, int64_t) { return 1.0f; });
}

template <class T, bool kPairs>
static void pack_weight(const Absorbed& a, const AbsorbedSizes& s, const Packed& weight, float* line, int64_t kv,
                        bool value) {
  const Operand& bias = value ? a.bias_value : a.bias_key;
  const int64_t* stride = value ? a.w_value_stride : a.w_key_stride;
  const int64_t rows = value ? a.p.dim_value : a.p.dim;
  const T* start = (const T*)(value ? a.w_value : a.w_key) + kv * stride[0];
  float last[kMaxDim] = {};
  if (bias.data) widen_operand(bias, kv * bias.stride0, rows, last);
  pack_matrix<T, kPairs>(
      s, rows, weight, line, [&](int64_t i) { return start + i * stride[1]; }, [&](int64_t i, int64_t c) { return c ? 0.0f : last[i]; });
}

template <class T, bool kPairs>
static void absorbed_items(const Absorbed& a, int64_t first_item, int64_t last_item, char* scratch) {
  const Problem& p = a.p;
  const AbsorbedSizes s(a, kPairs);
  const Sizes& z = s.z;
  Arena arena{scratch};
  const AbsorbedBuffers g(a, s, &arena);
  const ForwardBuffers& f = g.f;
  const float factor = p.scale * kLog2e;
  const int64_t per = kPairs ? 2 : 1, depth = (s.all + per - 1) / per, columns_of_width = round_up(s.all, 8);
  const int64_t panel = s.padded * kPanel, panel_pairs = panel / per, panel_p = z.keys * kPanel;
  const bool one_block = p.neighbours * p.retrieved <= z.keys;
  int64_t packed_place = -1;
  Rows rows;
  Keys keys;
  Prefetch none;
  for (int64_t index = first_item; index < last_item; ++index) {
    const Item item = item_at(p, index);
    if (item.count == 0) continue;
    if (one_block && index / p.kv_heads != packed_place) {
      int64_t cursor = 0;
      next_keys(p, item, z.keys, &cursor, item.slots, &keys);
      pack_states<T, kPairs>(a, s, g.states, g.line, item, keys);
      packed_place = index / p.kv_heads;
    }
    pack_weight<T, kPairs>(a, s, g.w_key, g.line, item.kv, false);
    pack_weight<T, kPairs>(a, s, g.w_value, g.line, item.kv, true);
    const int64_t blocks = row_blocks(p, item);
    for (int64_t block = 0; block < blocks; ++block) {
      make_rows(p, item, block, &rows);
      pack_query_rows<T, kPairs>(p, item, z, f, rows);

      const bool null_slot = p.null_key.data != nullptr;
      const uint64_t null_kept = null_slot && p.dropout ? draw_null(p, rows) : ~(uint64_t)0;
      for (int64_t i = 0; i < rows.padded; ++i) {
        f.highest[i] = -infinity();
        f.sum[i] = 0.0f;
        if (!null_slot || i >= rows.count) continue;
        if (i == 0 || rows.head[i] != rows.head[i - 1]) {
          __builtin_memset(f.null_key, 0, kMaxDim * 4);
          widen_operand(p.null_key, rows.head[i] * p.null_key.stride0, p.dim, f.null_key);
        }
        const float* q = f.raw + i * z.ld;
        if (kPairs) widen_row((const bfloat_t*)q, p.dim, f.wide, z.dim), q = f.wide;
        f.highest[i] = g.null_logit[i] = dot(q, f.null_key, z.dim) * factor;
        f.sum[i] = f.highest[i] == -infinity() ? 0.0f : 1.0f;
      }

      bool seen = false;
      for (int64_t cursor = 0; cursor < item.slots || (one_block && cursor == 0);) {
        if (one_block) {  // `keys` and the packed states are the chunk's
          cursor = item.slots + 1;
        } else {
          next_keys(p, item, z.keys, &cursor, item.slots, &keys);
          if (keys.count > 0) pack_states<T, kPairs>(a, s, g.states, g.line, item, keys);
        }
        if (keys.count == 0) break;
        if (!seen) {
          multiply_down<kPairs>(g.w_key, columns_of_width, z.depth, f.rows, panel_size(z.depth), kPanel, rows.padded,
                                g.staging, panel, false);
          pair_absorbed<kPairs>(s, rows.padded, g.staging, panel, g.absorbed, panel_pairs);
        }
        if (p.bias.data) gather_bias(p, rows, keys, f.bias);
        multiply_across<kPairs>(g.states, keys.padded, depth, g.absorbed, panel_pairs, rows.padded, f.scores, kPanel,
                                kRows);
        if (p.relative_key.data)
          add_relative<kPairs>(p, z, rows, keys, f.rows_relative, f.relative.band, f.relative.sheared, f.scores, &none);
        const auto softmax = p.dropout ? softmax_block<kPairs, true> : softmax_block<kPairs, false>;
        if (p.dropout) draw_keys(p, rows, keys, f.kept);
        softmax(keys, rows.padded, factor, p.bias.data ? f.bias : nullptr, f.scores, f.probabilities, f.highest, f.sum,
                f.rescale, f.kept);
        const int64_t key_depth = (keys.count + per - 1) / per;
        for (int64_t i = 0; i < rows.padded; i += kLanes)
          for (int64_t k = 0; k < key_depth; ++k)
            store(g.probabilities + i / kPanel * panel_p + k * kPanel + i % kPanel, load(f.probabilities + k * kRows + i));
        if (seen)
          for (int64_t i = 0; i < rows.padded; i += kLanes) {
            const vfloat alpha = load(f.rescale + i);
            float* x = g.gathered + i / kPanel * panel + i % kPanel;
            for (int64_t j = 0; j < columns_of_width; ++j) store(x + j * kPanel, load(x + j * kPanel) * alpha);
          }
        multiply_down<kPairs>(g.states, columns_of_width, key_depth, g.probabilities, panel_p, kPanel, rows.padded,
                              g.gathered, panel, seen);
        seen = true;
      }

      if (seen) {
        pair_rows<kPairs>(round_up(s.all, 2), rows.padded, g.gathered, panel, g.gathered_pairs, panel_pairs);
        const int64_t panel_out = z.dim_value * kPanel;
        multiply_across<kPairs>(g.w_value, round_up(p.dim_value, 8), depth, g.gathered_pairs, panel_pairs, rows.padded,
                                g.out, panel_out, kPanel);
        for (int64_t i = 0; i < rows.padded; i += kLanes)
          for (int64_t j = 0; j < z.dim_value; j += kLanes)
            transpose_square(g.out + i / kPanel * panel_out + j * kPanel + i % kPanel, kPanel,
                             f.out + i * z.dim_value + j, z.dim_value);
      } else {
        __builtin_memset(f.out, 0, (size_t)(kRows * z.dim_value) * 4);
      }
      float *const lse = f.rescale, *const log_sum = p.log_sum ? f.log_sum : nullptr;
      log_sum_exp(rows.padded, f.highest, f.sum, lse, log_sum);
      for (int64_t i = 0; i < rows.count; ++i) {
        const int64_t position = rows.position[i];
        T* out = (T*)p.out + position * p.dim_value;
        const float sum = f.sum[i];
        if ((!seen && !null_slot) || sum == 0.0f) {
          __builtin_memset((void*)out, 0, (size_t)p.dim_value * sizeof(T));
          p.lse[position] = -infinity();
          if (log_sum) p.log_sum[position] = 0.0f;
          continue;
        }
        if (null_slot && (null_kept >> i & 1)) {
          widen_operand(p.null_value, rows.head[i] * p.null_value.stride0, p.dim_value, f.null_value);
          add_scaled(f.out + i * z.dim_value, exp2(splat(g.null_logit[i] - f.highest[i]))[0], f.null_value, p.dim_value);
        }
        narrow_row(f.out + i * z.dim_value, p.dim_value, normaliser(p, f.highest[i], sum), out);
        p.lse[position] = lse[i];
        if (log_sum) p.log_sum[position] = log_sum[i];
      }
    }
  }
}

static size_t absorbed_scratch_bytes(const Absorbed& a) {
  const AbsorbedSizes s(a, a.p.type == kBFloat16 && RK_LEVEL >= 3);
  Arena arena{nullptr};
  AbsorbedBuffers(a, s, &arena);
  return arena.used;
}

static void absorbed_forward(const Absorbed& a, int64_t first_item, int64_t last_item, char* scratch) {
  [[maybe_unused]] const TileRegisters registers;
  if (a.p.type == kFloat32)
    absorbed_items<float, false>(a, first_item, last_item, scratch);
  else if (a.p.type == kFloat16)
    absorbed_items<half_t, false>(a, first_item, last_item, scratch);
  else
    absorbed_items<bfloat_t, (RK_LEVEL >= 3)>(a, first_item, last_item, scratch);
}

}  // namespace
}  // namespace RK_NAMESPACE
}  // namespace retro_kernels
