// Relative positions. The logit of a row and a token has a term that depends on their distance only, so the packed table
// of distances serves as further keys: a band of it times the rows gives [distance][row], in which token t's term of row
// i stands i places further down than row 0's. A shear moves every lane up by its own number; the same shear takes the
// scores' gradients back to distances. Only the distances that a strip of rows can see are multiplied.
#pragma once
#include "packing.h"

namespace retro_kernels {
namespace RK_NAMESPACE {
namespace {

// The packed table of one head: [distance][ld], and for pairs also [distance / 2][dim] with pairs along the distances.
template <bool kPairs>
RK_INLINE float* packed_table(const Problem& p, int64_t head) {
  return p.relative_packed + head * p.relative_rows * p.relative_width;
}

template <class T, bool kPairs>
static void pack_table(const Problem& p, const Sizes& z, int64_t head) {
  float* packed = packed_table<kPairs>(p, head);
  const int64_t at = head * p.relative_key.stride0;
  for (int64_t x = 0; x < p.relative_rows; ++x) {
    float* row = packed + x * z.ld_table;
    if (x >= p.distances) {
      __builtin_memset(row, 0, (size_t)z.ld_table * 4);
      continue;
    }
    float* wide = row;
    float line[kMaxDim];
    if (kPairs) wide = line;
    widen_operand(p.relative_key, at + x * p.relative_key.stride1, p.dim, wide);
    if constexpr (kPairs) {
      narrow_row(wide, p.dim, 1.0f, (bfloat_t*)row);
      for (int64_t i = p.dim; i < 2 * z.ld_table; ++i) ((bfloat_t*)row)[i].bits = 0;
    } else {
      for (int64_t i = p.dim; i < z.ld_table; ++i) row[i] = 0.0f;
    }
  }
  interleave_rows<kPairs>(packed, z.ld_table, p.relative_rows, z.dim, packed + p.relative_rows * z.ld_table, z.dim);
}

// The rows of vectors pushed one after the other, lane i delayed by i pushes.
struct Shear {
  vfloat one[1] = {}, two[2] = {}, four[4] = {}, eight[8] = {};

  template <int kBit>
  static inline __attribute__((always_inline)) vfloat pick(vfloat now, vfloat before) {
#if RK_LEVEL >= 2
    constexpr __mmask16 kMask = kBit == 1 ? 0xaaaa : kBit == 2 ? 0xcccc : kBit == 4 ? 0xf0f0 : 0xff00;
    return (vfloat)_mm512_mask_blend_ps(kMask, (__m512)now, (__m512)before);
#elif RK_LEVEL == 1
    constexpr int kMask = kBit == 1 ? 0xaa : kBit == 2 ? 0xcc : 0xf0;
    return (vfloat)_mm256_blend_ps((__m256)now, (__m256)before, kMask);
#else
    const vint late = kBit == 1 ? vint{0, -1, 0, -1} : vint{0, 0, -1, -1};
    return late ? before : now;
#endif
  }

  // The j-th push, j modulo 8: -> lane i of push j - i.
  inline __attribute__((always_inline)) vfloat push(int j, vfloat x) {
    vfloat y = pick<1>(x, one[0]);
    one[0] = x;
    x = pick<2>(y, two[j % 2]);
    two[j % 2] = y;
    if constexpr (kLanes > 4) {
      y = x;
      x = pick<4>(y, four[j % 4]);
      four[j % 4] = y;
    }
    if constexpr (kLanes > 8) {
      y = x;
      x = pick<8>(y, eight[j % 8]);
      eight[j % 8] = y;
    }
    return x;
  }
};

// Where the distances of a strip of up to kPanel rows and the tokens of a key block lie: band row y is distance
// first + y; vector v of the strip and token `low` + s meet in lane i at band row shift + v * kLanes + i + tokens - 1 - s.
struct Band {
  int64_t low, tokens, first, shift;
  int64_t vectors;
  // Of the `rows` that the table has, both vectors need [both, single), only the first those before, only the second
  // those after.
  int64_t both, single, rows;
  bool direct;                 // keys are the tokens of `neighbours` whole runs, in order
  int64_t neighbours;
};

template <bool kPairs>
RK_INLINE Band make_band(const Problem& p, const Rows& rows, const Keys& keys, int64_t strip) {
  Band band;
  const int64_t r = p.retrieved, n = keys.count, first = keys.slot[0], last = keys.slot[n - 1];
  const bool contiguous = last - first == n - 1;
  int64_t high = last % r;
  band.low = first % r;
  band.neighbours = 1;
  band.direct = contiguous && first / r == last / r;
  if (first / r != last / r) {
    band.low = 0, high = r - 1;
    band.neighbours = n / r;
    band.direct = contiguous && first % r == 0 && n % r == 0;
  }
  band.tokens = high - band.low + 1;
  band.first = rows.row[0] + strip - high + r - 1;
  band.shift = kPairs ? band.first % 2 : 0;
  band.first -= band.shift;
  band.vectors = rows.padded - strip > kLanes ? 2 : 1;
  const int64_t reach = band.shift + band.tokens + kLanes - 1, most_rows = round_up(p.distances - band.first, 8);
  band.single = least(round_up(reach, 8), most_rows);
  band.rows = band.vectors == 2 ? least(round_up(reach + kLanes, 8), most_rows) : band.single;
  band.both = band.vectors == 2 ? least((band.shift + kLanes) / 8 * 8, band.single) : band.single;
  return band;
}

constexpr int kBandSlack = 8;  // band rows before the first, read and not used
RK_INLINE int64_t band_size(const Sizes& z) { return (kBandSlack + z.keys + kPanel + 16) * kPanel; }

// scores[key][row] += the rows' term for the key's distance. `panels`: the rows as the content product has them, `band`
// and `sheared`: scratch of band_size each.
template <bool kPairs>
static void add_relative(const Problem& p, const Sizes& z, const Rows& rows, const Keys& keys, const float* panels,
                         float* band, float* sheared, float* scores, Prefetch* next) {
  const float* table = packed_table<kPairs>(p, rows.head[0]);
  band += kBandSlack * kPanel;
  for (int64_t strip = 0; strip < rows.padded; strip += kPanel) {
    const Band g = make_band<kPairs>(p, rows, keys, strip);
    const float* at = table + g.first * z.ld_table;
    const float* panel = panels + strip / kPanel * panel_size(z.depth);
    const auto product = [&](int64_t from, int64_t to, int64_t v, int64_t vectors) {
      if (from < to)
        multiply<false, kPairs>(to - from, vectors * kLanes, z.depth, at + from * z.ld_table, z.ld_table, panel + v * kLanes, kPanel,
                                0, band + from * kPanel + v * kLanes, kPanel, false, next);
    };
    product(0, g.both, 0, 1);
    if (g.vectors == 2) {
      product(g.both, g.single, 0, 2);
      product(g.single, g.rows, 1, 1);
    }
    for (int64_t y = g.rows; y < g.shift + g.tokens + g.vectors * kLanes - 1; ++y)  // past the table: padded rows only
      for (int64_t v = 0; v < g.vectors; ++v) store(band + y * kPanel + v * kLanes, vfloat{});
    for (int64_t v = 0; v < g.vectors; ++v) {
      Shear shear;
      const float* from = band + (g.shift + g.tokens + kLanes - 2 + v * kLanes) * kPanel + v * kLanes;
      RK_UNROLL for (int j = 1; j < kLanes; ++j, from -= kPanel) shear.push(j, load(from));
      float* to = sheared + v * kLanes;
      int64_t s = 0;
      if (g.direct && g.neighbours == 1) {
        float* c = scores + strip + v * kLanes;
        for (; s + 8 <= g.tokens; s += 8)
          RK_UNROLL for (int j = 0; j < 8; ++j, from -= kPanel, c += kRows) store(c, load(c) + shear.push(j, load(from)));
        RK_UNROLL for (int j = 0; j < 8; ++j, from -= kPanel, c += kRows) {
          const vfloat x = shear.push(j, load(from));
          if (s + j < g.tokens) store(c, load(c) + x);
        }
      } else if (g.direct && g.neighbours == 2) {
        float *c = scores + strip + v * kLanes, *d = c + g.tokens * kRows;
        for (; s + 8 <= g.tokens; s += 8)
          RK_UNROLL for (int j = 0; j < 8; ++j, from -= kPanel, c += kRows, d += kRows) {
            const vfloat x = shear.push(j, load(from));
            store(c, load(c) + x);
            store(d, load(d) + x);
          }
        RK_UNROLL for (int j = 0; j < 8; ++j, from -= kPanel, c += kRows, d += kRows) {
          const vfloat x = shear.push(j, load(from));
          if (s + j >= g.tokens) continue;
          store(c, load(c) + x);
          store(d, load(d) + x);
        }
      } else {
        for (; s < g.tokens; s += 8)
          RK_UNROLL for (int j = 0; j < 8; ++j, from -= kPanel, to += kPanel) store(to, shear.push(j, load(from)));
      }
    }
    if (g.direct && g.neighbours <= 2) continue;
    for (int64_t k = 0; k < keys.count; ++k) {
      const float* from = sheared + (keys.slot[k] % p.retrieved - g.low) * kPanel;
      float* c = scores + k * kRows + strip;
      for (int64_t v = 0; v < g.vectors; ++v) store(c + v * kLanes, load(c + v * kLanes) + load(from + v * kLanes));
    }
  }
}

#if RK_LEVEL >= 3
// 32 rows of probabilities or dS of one key, as bf16: pairs along the rows (`store_pairs` makes those along the keys).
RK_INLINE void store_down(vfloat low, vfloat high, float* p) {
  const __m512bh packed = _mm512_cvtne2ps_pbh((__m512)high, (__m512)low);
  __builtin_memcpy(p, &packed, 64);
}
#endif

struct RelativeBuffers {
  float *band, *sheared, *down, *across, *tail;

  RelativeBuffers(const Problem& p, const Sizes& z, bool backward, Arena* arena) {
    const int64_t size = p.relative_key.data ? band_size(z) : 0;
    band = arena->take(size);
    sheared = arena->take(size);
    down = arena->take(backward && z.pairs ? size / 2 : 0);
    across = arena->take(backward && z.pairs ? size / 2 : 0);
    tail = arena->take(backward ? 8 * z.dim : 0);
  }
};

// From dS [key][row]: grad_rows [row][dim] += dP R, and the copy's share of dR += dP' Q. `query`: the rows that met the
// table, [row][ld], or with pairs along the rows [row / 2][dim].
template <bool kPairs>
static void add_relative_gradients(const Problem& p, const Sizes& z, const RelativeBuffers& f, const Rows& rows,
                                   const Keys& keys, const float* grad_scores, const float* query, float* grad_rows,
                                   int64_t copy, Prefetch* next) {
  const float* table = packed_table<kPairs>(p, rows.head[0]);
  const int64_t ld_query = kPairs ? z.dim : z.ld;
  float* const band = f.band + kBandSlack * kPanel;
  for (int64_t strip = 0; strip < rows.padded; strip += kPanel) {
    const Band g = make_band<kPairs>(p, rows, keys, strip);
    const bool direct = g.direct && g.neighbours == 1;
    if (!direct) {
      __builtin_memset(f.sheared, 0, (size_t)(g.tokens * kPanel) * 4);
      for (int64_t k = 0; k < keys.count; ++k) {
        float* to = f.sheared + (keys.slot[k] % p.retrieved - g.low) * kPanel;
        const float* from = grad_scores + k * kRows + strip;
        for (int64_t v = 0; v < g.vectors; ++v) store(to + v * kLanes, load(to + v * kLanes) + load(from + v * kLanes));
      }
    }
    const int64_t ld_from = direct ? kRows : kPanel;
    for (int64_t v = 0; v < g.vectors; ++v) {
      Shear shear;
      const float* from = (direct ? grad_scores + strip : f.sheared) + (g.tokens - 1) * ld_from + v * kLanes;
      float* to = band + v * kLanes;
      int64_t y = 0;
      for (const int64_t begin = g.shift + v * kLanes; y < begin; ++y, to += kPanel) store(to, vfloat{});
      int64_t s = 0;
      for (; s + 8 <= g.tokens; s += 8)
        RK_UNROLL for (int j = 0; j < 8; ++j, from -= ld_from, to += kPanel) store(to, shear.push(j, load(from)));
      const int64_t end = g.tokens + kLanes - 1;
      for (; s < end; s += 8)
        RK_UNROLL for (int j = 0; j < 8; ++j, from -= ld_from, to += kPanel) {
          const vfloat x = shear.push(j, s + j < g.tokens ? load(from) : vfloat{});
          if (s + j < end) store(to, x);
        }
      for (y += end; y < g.rows; ++y) store(band + y * kPanel + v * kLanes, vfloat{});
    }
    const float *down = band, *across = band;
    int64_t ld_down = kPanel;
#if RK_LEVEL >= 3
    if constexpr (kPairs) {
      down = f.down, across = f.across;
      ld_down = kPanel / 2;
      for (int64_t y = 0; y < g.rows; y += 2) {
        const float* a = band + y * kPanel;
        const bool two = g.vectors == 2;
        const vfloat low0 = load(a), low1 = load(a + kPanel);
        const vfloat high0 = two ? load(a + kLanes) : vfloat{}, high1 = two ? load(a + kPanel + kLanes) : vfloat{};
        store_down(low0, high0, f.down + y * ld_down);
        store_down(low1, high1, f.down + (y + 1) * ld_down);
        store_pairs(low0, low1, f.across + y / 2 * kPanel);
        store_pairs(high0, high1, f.across + y / 2 * kPanel + kLanes);
      }
    }
#endif
    // dQ: every vector of rows with its own part of the band
    for (int64_t v = 0; v < g.vectors; ++v) {
      float* to = grad_rows + (strip + v * kLanes) * z.dim;
      const int64_t deep = least(g.shift + g.tokens + kLanes - 1, g.rows - v * kLanes);
      if (deep <= 0) continue;
      if constexpr (kPairs)
        multiply<true, true>(kLanes, z.dim, (deep + 1) / 2, across + v * kLanes / 2 * kPanel + v * kLanes,
                             kPanel, table + p.relative_rows * z.ld_table + (g.first + v * kLanes) / 2 * z.dim, z.dim, kPanel, to,
                             z.dim, true, next);
      else
        multiply<true, false>(kLanes, z.dim, deep, across + v * kLanes * kPanel + v * kLanes, kPanel,
                              table + (g.first + v * kLanes) * z.ld_table, z.ld_table, kPanel, to, z.dim, true, next);
    }
    if (!p.relative_partial) continue;
    constexpr int64_t kDeep = kPairs ? kLanes / 2 : kLanes;  // elements of one vector's rows
    float* total = p.relative_partial + ((copy * p.heads + rows.head[0]) * p.distances + g.first) * z.dim;
    const int64_t left = p.distances - g.first;  // what follows in memory may be another thread's
    const float* row = query + strip / (kPairs ? 2 : 1) * ld_query;
    const auto product = [&](int64_t from, int64_t to, int64_t v, int64_t vectors) {
      const auto part = [&](int64_t begin, int64_t end, float* c, bool add) {
        multiply<false, kPairs>(end - begin, z.dim, vectors * kDeep, down + begin * ld_down + v * kDeep, ld_down,
                                row + v * kDeep * ld_query, ld_query, kPanel, c, z.dim, add, next);
      };
      const int64_t whole = most(from, least(to, left / 8 * 8));
      if (from < whole) part(from, whole, total + from * z.dim, true);
      if (whole >= to || whole >= left) return;
      part(whole, whole + 8, f.tail, false);
      add_scaled(total + whole * z.dim, 1.0f, f.tail, (left - whole) * z.dim);
    };
    product(0, g.both, 0, 1);
    if (g.vectors == 2) {
      product(g.both, g.single, 0, 2);
      product(g.single, g.rows, 1, 1);
    }
  }
}

}  // namespace
}  // namespace RK_NAMESPACE
}  // namespace retro_kernels
