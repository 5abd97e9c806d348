// The absorbed backward. Every row's log-sum-exp and delta are known; for every head of a chunk, with W the weights, E the
// states, A = Wk' Q' and G = E' P' as in the forward,
//
//   D = Wv' dO'    S' = E A    dP' = E D    dS = P (dP - delta)    B = E' dS'        (columns of the width by rows)
//   dQ' = Wk B     dWk' = B Q    dWv' = G dO    dE' = [A | D] [dS ; P]
//
// A call takes a range of kv heads and up to kMostBlocks key blocks of one chunk, whose states it packs once. Its share
// of dE' goes to the range's own partial sum, which `absorbed_states` adds up; dWk' and dWv' are added to one sum, in
// which heads lie apart. The columns of biases give the biases' gradients. The query's gradient takes its share of
// bias_key, bias_key times the sum of the slots' dS, not from B: that sum is dlse less the null slot's dS, exactly, where
// the sum of rounded dS is off by what bias_value leaves of delta's rounding.
#pragma once
#include "absorbed.h"
#include "backward.h"

namespace retro_kernels {
namespace RK_NAMESPACE {
namespace {

constexpr int kMostBlocks = 4;

// The visible slots of [begin, end), in key blocks. Block j has the columns from j * key_block on of the partial sums.
struct KeyBlocks {
  int64_t count = 0;
  Keys keys[kMostBlocks];

  KeyBlocks(const Problem& p, const Item& item, int64_t key_block, int64_t begin, int64_t end) {
    for (int64_t cursor = begin; cursor < end;) {
      next_keys(p, item, key_block, &cursor, end, &keys[count]);
      if (keys[count].count > 0) ++count;
    }
  }
};

struct AbsorbedBackwardBuffers {
  BackwardBuffers f;
  Packed states[kMostBlocks];
  Packed w_key, w_value;
  int64_t ld_rowed, ld_both;
  float *line;
  float *absorbed, *absorbed_pairs, *outer, *outer_pairs;  // A and D
  float *gathered, *turned, *turned_pairs;                 // G and B
  float *both, *rowed;                                     // [A | D], and G or B: a row of the width after the other
  float *weights;                                          // [dS ; P]
  float *grad_rows;

  AbsorbedBackwardBuffers(const Absorbed& a, const AbsorbedSizes& s, Arena* arena)
      : f(a.p, s.z, arena),
        states{Packed(s, s.z.keys, true, true, arena), Packed(s, a.blocks > 1 ? s.z.keys : 0, true, true, arena),
               Packed(s, a.blocks > 2 ? s.z.keys : 0, true, true, arena),
               Packed(s, a.blocks > 3 ? s.z.keys : 0, true, true, arena)},
        w_key(s, a.p.dim, true, true, arena), w_value(s, a.p.dim_value, false, true, arena) {
    const int64_t per = s.z.pairs ? 2 : 1, size = kRows * (s.padded + 16);
    ld_rowed = kRows / per + 16;
    ld_both = 2 * kRows / per + 16;
    line = arena->take(2 * (s.padded + 32));
    absorbed = arena->take(size);
    absorbed_pairs = s.z.pairs ? arena->take(size / 2) : absorbed;
    outer = arena->take(size);
    outer_pairs = s.z.pairs ? arena->take(size / 2) : outer;
    gathered = arena->take(size);
    turned = arena->take(size);
    turned_pairs = s.z.pairs ? arena->take(size / 2) : turned;
    both = arena->take(s.padded * ld_both);
    rowed = arena->take(s.padded * ld_rowed);
    weights = arena->take(2 * kRows / per * (s.z.keys + 16));
    grad_rows = arena->take(kRows * round_up(s.z.dim, 16));
    if (s.z.pairs) f.p_across = arena->take(s.z.keys / 2 * kRows);
  }
};

// fp32 panels [row][kPanel] times `factor` to [row][column], with pairs of adjacent columns.
template <bool kPairs>
RK_INLINE void unpanel(int64_t rows, int64_t columns, const float* from, int64_t panel, float factor, float* to,
                       int64_t ld) {
  for (int64_t x = 0; x < columns; x += kPanel) {
    const bool two = x + kLanes < columns;
    const float* at = from + x / kPanel * panel;
    for (int64_t j = 0; j < rows; ++j) {
      const vfloat low = load(at + j * kPanel) * factor;
      const vfloat high = two ? load(at + j * kPanel + kLanes) * factor : vfloat{};
#if RK_LEVEL >= 3
      if constexpr (kPairs) {
        store_down(low, high, to + j * ld + x / 2);
        continue;
      }
#endif
      store(to + j * ld + x, low);
      if (two) store(to + j * ld + x + kLanes, high);
    }
  }
}

// bias_key's share of the query's gradient, of all slots at once.
static void add_bias_key(const Absorbed& a, const Sizes& z, const BackwardBuffers& f, const Rows& rows, int64_t kv) {
  const Problem& p = a.p;
  widen_operand(a.bias_key, kv * a.bias_key.stride0, p.dim, f.wide);
  for (int64_t i = 0; i < rows.count; ++i) {
    if (f.lse[i] == infinity()) continue;  // it saw nothing
    const float sum = (p.grad_lse ? p.grad_lse[rows.position[i]] : 0.0f) - f.null_grad[i];
    add_scaled(f.grad_query + i * z.dim, sum, f.wide, p.dim);
  }
}

// One range of kv heads, [first_head, last_head), against the slots [begin, end) of a (batch, chunk).
template <class T, bool kPairs>
static void absorbed_backward_typed(const Absorbed& a, int64_t place, int64_t begin, int64_t end, int64_t range,
                                    int64_t first_head, int64_t last_head, char* scratch) {
  const Problem& p = a.p;
  const AbsorbedSizes s(a, kPairs);
  const Sizes& z = s.z;
  Arena arena{scratch};
  const AbsorbedBackwardBuffers g(a, s, &arena);
  const BackwardBuffers& f = g.f;
  const int64_t per = kPairs ? 2 : 1, depth = (s.all + per - 1) / per, width = round_up(s.all, 8);
  const int64_t panel = s.padded * kPanel, panel_pairs = panel / per;
  const bool first = begin == 0;
  float* const grad_states = a.grad_states ? a.grad_states + range * s.padded * a.ld_states : nullptr;
  if (grad_states) __builtin_memset(grad_states, 0, (size_t)(s.padded * a.ld_states) * 4);
  Prefetch none;
  Rows rows;

  const Item shared = item_at(p, place * p.kv_heads + first_head);
  if (shared.count == 0) return;
  const KeyBlocks blocks(p, shared, z.keys, begin, end);
  const bool last = end == shared.slots;
  for (int64_t j = 0; j < blocks.count; ++j) pack_states<T, kPairs>(a, s, g.states[j], g.line, shared, blocks.keys[j]);

  for (int64_t kv = first_head; kv < last_head; ++kv) {
    const Item item = item_at(p, place * p.kv_heads + kv);
    pack_weight<T, kPairs>(a, s, g.w_key, g.line, kv, false);
    pack_weight<T, kPairs>(a, s, g.w_value, g.line, kv, true);
    for (int64_t block = 0; block < row_blocks(p, item); ++block) {
      make_rows(p, item, block, &rows);
      pack_backward_rows<T, kPairs>(p, item, z, f, rows, first, first, 0);
      if (!first || !p.null_key.data) __builtin_memset(f.grad_query, 0, (size_t)(rows.padded * z.dim) * 4);
      if (first && a.bias_key.data) add_bias_key(a, z, f, rows, kv);
      if (!first && p.relative_key.data) __builtin_memset(f.grad_query_relative, 0, (size_t)(kRows * z.dim) * 4);
      const int64_t row_depth = rows.padded / per;
      if (blocks.count > 0) {
        multiply_down<kPairs>(g.w_key, width, z.depth, f.query_panels, panel_size(z.depth), kPanel, rows.padded,
                              g.absorbed, panel, false);
        pair_absorbed<kPairs>(s, rows.padded, g.absorbed, panel, g.absorbed_pairs, panel_pairs);
        multiply_down<kPairs>(g.w_value, width, z.depth_value, f.grad_panels, panel_size(z.depth_value), kPanel,
                              rows.padded, g.outer, panel, false);
        pair_absorbed<kPairs>(s, rows.padded, g.outer, panel, g.outer_pairs, panel_pairs);
        if (grad_states) {
          unpanel<kPairs>(width, rows.padded, g.absorbed, panel, p.scale, g.both, g.ld_both);
          unpanel<kPairs>(width, rows.padded, g.outer, panel, 1.0f, g.both + row_depth, g.ld_both);
        }
      }
      for (int64_t j = 0; j < blocks.count; ++j) {
        const Keys& keys = blocks.keys[j];
        if (p.bias.data) gather_bias(p, rows, keys, f.bias);
        multiply_across<kPairs>(g.states[j], keys.padded, depth, g.absorbed_pairs, panel_pairs, rows.padded, f.scores,
                                kPanel, kRows);
        if (p.relative_key.data)
          add_relative<kPairs>(p, z, rows, keys, f.query_relative_panels, f.relative.band, f.relative.sheared, f.scores,
                               &none);
        multiply_across<kPairs>(g.states[j], keys.padded, depth, g.outer_pairs, panel_pairs, rows.padded, f.grad_scores,
                                kPanel, kRows);
        if (p.dropout) draw_keys(p, rows, keys, f.kept);
        const bool wide = p.bias_partial || p.relative_key.data;
        differentiate<kPairs>(p, keys, rows, p.scale * kLog2e, p.bias.data ? f.bias : nullptr, wide, f);
        if (p.bias_partial) add_bias_gradient(p, rows, keys, f.grad_scores, 0);
        if (p.relative_key.data)
          add_relative_gradients<kPairs>(p, z, f.relative, rows, keys, f.grad_scores, f.query_relative_across,
                                         f.grad_query_relative, 0, &none);
        const int64_t key_depth = (keys.count + per - 1) / per;
        if (a.w_value_total)
          multiply_down<kPairs>(g.states[j], width, key_depth, kPairs ? f.p_across : f.scores, kPanel, kRows,
                                rows.padded, g.gathered, panel, j > 0);
        multiply_down<kPairs>(g.states[j], width, key_depth, f.ds_across, kPanel, kRows, rows.padded, g.turned, panel,
                              j > 0);
        if (!grad_states) continue;
        const int64_t ld = z.keys + 16, ld_down = kRows / per;
        for (int64_t i = 0; i < row_depth; i += kLanes)
          for (int64_t k = 0; k < keys.count; k += kLanes) {
            transpose_square(f.ds_down + k * ld_down + i, ld_down, g.weights + i * ld + k, ld);
          }
        for (int64_t i = 0; i < row_depth; i += kLanes)
          for (int64_t k = 0; k < keys.count; k += kLanes)
            transpose_square(f.p_down + k * ld_down + i, ld_down, g.weights + (row_depth + i) * ld + k, ld);
        multiply_strip<false, kPairs, true>(width, (keys.count + kLanes - 1) / kLanes, 2 * row_depth, g.both, g.ld_both,
                                            g.weights, ld, kPanel, grad_states + j * z.keys, a.ld_states, &none);
      }
      if (blocks.count > 0) {
        if (a.w_value_total) {
          unpanel<kPairs>(width, rows.padded, g.turned, panel, 1.0f, g.rowed, g.ld_rowed);
          multiply_strip<false, kPairs, true>(width, z.dim / kLanes, row_depth, g.rowed, g.ld_rowed, f.query_across,
                                              kPairs ? z.dim : z.ld, kPanel, a.w_key_total + kv * s.padded * z.dim,
                                              z.dim, &none);
          unpanel<kPairs>(width, rows.padded, g.gathered, panel, 1.0f, g.rowed, g.ld_rowed);
          multiply_strip<false, kPairs, true>(width, z.dim_value / kLanes, row_depth, g.rowed, g.ld_rowed,
                                              f.grad_across, kPairs ? z.dim_value : z.ld_value, kPanel,
                                              a.w_value_total + kv * s.padded * z.dim_value, z.dim_value, &none);
        }
        if (a.bias_key.data)
          for (int64_t i = 0; i < rows.padded; i += kPanel)
            __builtin_memset(g.turned + i / kPanel * panel + a.width * kPanel, 0, 2 * kPanel * 4);
        pair_rows<kPairs>(round_up(s.all, 2), rows.padded, g.turned, panel, g.turned_pairs, panel_pairs);
        const int64_t panel_rows = round_up(z.dim, 16) * kPanel;
        multiply_across<kPairs>(g.w_key, round_up(p.dim, 8), depth, g.turned_pairs, panel_pairs, rows.padded, g.grad_rows,
                                panel_rows, kPanel);
        float square[kLanes * kLanes] __attribute__((aligned(64)));
        for (int64_t i = 0; i < rows.padded; i += kLanes)
          for (int64_t j = 0; j < z.dim; j += kLanes) {
            transpose_square(g.grad_rows + i / kPanel * panel_rows + j * kPanel + i % kPanel, kPanel, square, kLanes);
            for (int64_t x = 0; x < kLanes; ++x) {
              float* to = f.grad_query + (i + x) * z.dim + j;
              store(to, load(to) + load(square + x * kLanes));
            }
          }
      }
      if (p.relative_key.data) join_relative(p, z, f, rows, 0);
      if (!(first && last)) {  // the sum over all slots of the chunk
        for (int64_t i = 0; i < rows.count; ++i) {
          float* total = a.query_total + (rows.head[i] * p.stride + rows.row[i]) * z.dim;
          float* mine = f.grad_query + i * z.dim;
          if (!first) add_scaled(mine, 1.0f, total, z.dim);
          if (!last) __builtin_memcpy(total, mine, (size_t)z.dim * 4);
        }
      }
      if (last) write_queries<T>(p, z, f, rows, true);
    }
  }
}

// Adds up the ranges' shares of dE for 16 columns of the partial sums from `column` on, and writes them.
template <class T, bool kPairs>
static void absorbed_states_typed(const Absorbed& a, int64_t place, int64_t begin, int64_t end, int64_t column) {
  const Problem& p = a.p;
  const AbsorbedSizes s(a, kPairs);
  const Item item = item_at(p, place * p.kv_heads);
  if (item.count == 0) return;
  const KeyBlocks blocks(p, item, s.z.keys, begin, end);
  T* const out = (T*)a.grad_encoded + (item.b * p.chunks + item.chunk) * p.neighbours * p.retrieved * a.width;
  float square[kLanes * kLanes] __attribute__((aligned(64)));
  const int64_t block = column / s.z.keys, within = column % s.z.keys;
  if (block >= blocks.count) return;
  const Keys& keys = blocks.keys[block];
  for (int64_t k = within; k < within + 16 && k < keys.count; k += kLanes)
    for (int64_t w = 0; w < a.width; w += kLanes) {
      for (int64_t i = 0; i < kLanes; ++i) {
        vfloat sum = {};
        for (int64_t range = 0; range < a.ranges; ++range)
          sum += load(a.grad_states + (range * s.padded + w + i) * a.ld_states + block * s.z.keys + k);
        store(square + i * kLanes, sum);
      }
      float turned[kLanes * kLanes] __attribute__((aligned(64)));
      transpose_square(square, kLanes, turned, kLanes);
      for (int64_t i = 0; i < kLanes && k + i < keys.count; ++i)
        narrow_row(turned + i * kLanes, least(kLanes, a.width - w), 1.0f, out + keys.slot[k + i] * a.width + w);
    }
}

static size_t absorbed_backward_scratch_bytes(const Absorbed& a) {
  const AbsorbedSizes s(a, a.p.type == kBFloat16 && RK_LEVEL >= 3);
  Arena arena{nullptr};
  AbsorbedBackwardBuffers(a, s, &arena);
  return arena.used;
}

static void absorbed_backward(const Absorbed& a, int64_t place, int64_t begin, int64_t end, int64_t range,
                              int64_t first_head, int64_t last_head, char* scratch) {
  [[maybe_unused]] const TileRegisters registers;
  const auto run = a.p.type == kFloat32   ? absorbed_backward_typed<float, false>
                   : a.p.type == kFloat16 ? absorbed_backward_typed<half_t, false>
                                          : absorbed_backward_typed<bfloat_t, (RK_LEVEL >= 3)>;
  run(a, place, begin, end, range, first_head, last_head, scratch);
}

static void absorbed_states(const Absorbed& a, int64_t place, int64_t begin, int64_t end, int64_t column) {
  const auto run = a.p.type == kFloat32   ? absorbed_states_typed<float, false>
                   : a.p.type == kFloat16 ? absorbed_states_typed<half_t, false>
                                          : absorbed_states_typed<bfloat_t, (RK_LEVEL >= 3)>;
  run(a, place, begin, end, column);
}

}  // namespace
}  // namespace RK_NAMESPACE
}  // namespace retro_kernels
