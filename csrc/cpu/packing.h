// Queries, keys, values and bias from where they lie into what the products read.
#pragma once
#include "layout.h"

namespace retro_kernels {
namespace RK_NAMESPACE {
namespace {

// One row of d elements into `dst` as the products want it: fp32, or bf16 (two to an element), zero beyond d. Rotated,
// or with `added` (fp32) added.
template <class T, bool kPairs>
RK_INLINE void pack_row(const T* src, int64_t d, const Operand* cosine, const Operand* sine, int64_t row,
                        int64_t width, bool interleaved, float* dst, int64_t padded, const float* added = nullptr) {
  if constexpr (kPairs) {
    bfloat_t* out = (bfloat_t*)dst;
    if (width == 0 && !added) {
      int64_t i = 0;
      for (; i + 32 <= d; i += 32) __builtin_memcpy(out + i, src + i, 64);
      for (; i < d; ++i) __builtin_memcpy(out + i, src + i, 2);
    } else {
      float x[kMaxDim];
      widen_row(src, d, x, round_up(d, 16));
      if (width > 0) rotate(x, *cosine, *sine, row, width, interleaved, 1.0f);
      if (added) add_scaled(x, 1.0f, added, d);
      narrow_row(x, d, 1.0f, out);
    }
    for (int64_t i = d; i < 2 * padded; ++i) out[i].bits = 0;
  } else {
    widen_row(src, d, dst, padded);
    if (width > 0) rotate(dst, *cosine, *sine, row, width, interleaved, 1.0f);
    if (added) add_scaled(dst, 1.0f, added, d);
  }
}

#if RK_LEVEL >= 3
// dst[i] = pair (a[i], b[i])
RK_INLINE void interleave(const bfloat_t* a, const bfloat_t* b, int64_t n, float* dst) {
  for (int64_t i = 0; i < n; i += 16) {
    const __m512i low = _mm512_castsi256_si512(_mm256_loadu_si256((const __m256i*)(a + i)));
    _mm512_storeu_si512(dst + i, in_turn(_mm512_inserti64x4(low, _mm256_loadu_si256((const __m256i*)(b + i)), 1)));
  }
}
#endif

RK_INLINE int64_t panel_size(int64_t depth) { return round_up(depth, 16) * kPanel; }

// Rows [row][ld] into panels: dst[panel of kPanel rows][element][row in panel].
RK_INLINE void transpose_rows(const float* rows, int64_t ld, int64_t padded_rows, int64_t elements, float* dst) {
  for (int64_t i = 0; i < padded_rows; i += kLanes)
    for (int64_t j = 0; j < elements; j += kLanes)
      transpose_square(rows + i * ld + j, ld, dst + i / kPanel * panel_size(elements) + j * kPanel + i % kPanel, kPanel);
}

// dst = panels + added[element] in every row. `added` is fp32 and has an element for every one of d, the panels `depth`.
template <bool kPairs>
RK_INLINE void add_to_panels(const float* panels, const float* added, int64_t padded_rows, int64_t d, int64_t depth,
                             float* dst) {
  for (int64_t i = 0; i < padded_rows; i += kLanes) {
    const int64_t start = i / kPanel * panel_size(depth) + i % kPanel;
    for (int64_t j = 0; j < depth; ++j) {
      const int64_t at = start + j * kPanel;
#if RK_LEVEL >= 3
      if constexpr (kPairs) {
        const __m512i pair = _mm512_loadu_si512(panels + at);
        const vfloat low = (vfloat)_mm512_slli_epi32(pair, 16) + added[2 * j];
        const vfloat high =
            (vfloat)_mm512_and_si512(pair, _mm512_set1_epi32((int)0xffff0000)) + (2 * j + 1 < d ? added[2 * j + 1] : 0.0f);
        store_pairs(low, high, dst + at);
        continue;
      }
#endif
      store(dst + at, load(panels + at) + added[j]);
    }
  }
}

// Where a row lies in query, or in grad_out. In elements.
RK_INLINE int64_t row_offset(const int64_t* stride, const Item& item, const Rows& rows, int64_t i) {
  return item.b * stride[0] + item.query_chunk * stride[1] + rows.neighbour[i] * stride[2] + rows.token[i] * stride[3] +
         rows.head[i] * stride[4];
}

// The vector of a parameter [h, d] that belongs to the block's one head, widened into `dst`; null without the parameter.
RK_INLINE const float* head_vector(const Problem& p, const Operand& parameter, const Rows& rows, float* dst) {
  if (!parameter.data) return nullptr;
  widen_operand(parameter, rows.head[0] * parameter.stride0, p.dim, dst);
  return dst;
}

// Where a slot lies in key or value.
RK_INLINE int64_t key_offset(const Problem& p, const int64_t* stride, const Item& item, int64_t slot) {
  const int64_t start =
      item.b * stride[0] + item.chunk * stride[1] + item.neighbour * stride[2] + item.kv * stride[4];
  // 32-bit division is several times faster, and nearly every call can use it
  if (((uint64_t)slot | (uint64_t)p.retrieved) >> 32 == 0) {
    const uint32_t neighbour = (uint32_t)slot / (uint32_t)p.retrieved, token = (uint32_t)slot % (uint32_t)p.retrieved;
    return start + neighbour * stride[2] + token * stride[3];
  }
  return start + slot / p.retrieved * stride[2] + slot % p.retrieved * stride[3];
}

// The row of the key's rotary tables.
RK_INLINE int64_t key_angle(const Problem& p, const Item& item, int64_t slot) {
  const int64_t token = slot % p.retrieved;
  return p.first_visible ? token - p.first_visible[item.b * p.tokens + token] : token;
}

template <class T, bool kPairs>
static void pack_keys(const Problem& p, const Item& item, const Sizes& z, const Keys& keys, float* packed) {
  for (int64_t i = 0; i < keys.count; ++i)
    pack_row<T, kPairs>((const T*)p.key + key_offset(p, p.key_stride, item, keys.slot[i]), p.dim, &p.key_cos,
                        &p.key_sin, p.rotary_width ? key_angle(p, item, keys.slot[i]) : 0, p.rotary_width,
                        p.rotary_interleaved, packed + i * z.ld, z.ld - 16);
  for (int64_t i = keys.count; i < keys.padded; ++i) __builtin_memset(packed + i * z.ld, 0, (size_t)(z.ld - 16) * 4);
}

template <class T, bool kPairs>
static void pack_values(const Problem& p, const Item& item, const Sizes& z, const Keys& keys, float* packed) {
  for (int64_t i = 0; i < keys.count; ++i)
    pack_row<T, kPairs>((const T*)p.value + key_offset(p, p.value_stride, item, keys.slot[i]), p.dim_value, nullptr,
                        nullptr, 0, 0, false, packed + i * z.ld_value, z.ld_value - 16);
  for (int64_t i = keys.count; i < keys.padded; ++i)
    __builtin_memset(packed + i * z.ld_value, 0, (size_t)(z.ld_value - 16) * 4);
}

// Rows [row][ld] of pairs along their length into [row / 2][dim] of pairs along the rows.
template <bool kPairs>
RK_INLINE void interleave_rows(const float* rows, int64_t ld, int64_t count, int64_t dim, float* dst, int64_t ld_dst) {
#if RK_LEVEL >= 3
  if constexpr (kPairs)
    for (int64_t i = 0; i < count; i += 2)
      interleave((const bfloat_t*)(rows + i * ld), (const bfloat_t*)(rows + (i + 1) * ld), dim, dst + i / 2 * ld_dst);
#endif
}

// The values of adjacent visible keys as pairs, straight from memory. d_value is a multiple of 16.
template <class T, bool kPairs>
static void interleave_values(const Problem& p, const Item& item, const Sizes& z, const Keys& keys, float* packed) {
#if RK_LEVEL >= 3
  if constexpr (kPairs) {
    static const bfloat_t zeros[kMaxDim] = {};
    for (int64_t i = 0; i < keys.count; i += 2) {
      const T* a = (const T*)p.value + key_offset(p, p.value_stride, item, keys.slot[i]);
      const T* b =
          i + 1 < keys.count ? (const T*)p.value + key_offset(p, p.value_stride, item, keys.slot[i + 1]) : zeros;
      interleave(a, b, p.dim_value, packed + i / 2 * z.dim_value);
    }
  }
#endif
}

// x[0, n) * log2(e), where what is finite stays finite: a mask of the largest finite numbers is not one of infinities.
// Works on whole vectors.
static void scale_bias(float* x, int64_t n) {
  for (int64_t i = 0; i < n; i += kLanes) {
    const vfloat given = load(x + i), scaled = given * kLog2e, bound = smaller(splat(kMost), larger(splat(-kMost), scaled));
    const vint infinite = (given == splat(infinity())) | (given == splat(-infinity()));
    store(x + i, infinite ? given : bound);
  }
}

// Consecutive keys of a block whose slots are consecutive in the bias, too: the same for all its rows.
struct BiasRuns {
  int64_t count = 0;
  int64_t key[kMostKeys], start[kMostKeys], length[kMostKeys];

  BiasRuns(const Problem& p, const Keys& keys) {
    for (int64_t k = 0; k < keys.count; k += length[count++]) {
      int64_t n = 1;
      key[count] = k, start[count] = keys.slot[k] % p.bias_slots;
      while (k + n < keys.count && keys.slot[k + n] == keys.slot[k] + n && start[count] + n < p.bias_slots) ++n;
      length[count] = n;
    }
  }
};

// bias[key][row] * log2(e)
static void gather_bias(const Problem& p, const Rows& rows, const Keys& keys, float* bias) {
  const BiasRuns runs(p, keys);
  float square[kLanes * kMostKeys] __attribute__((aligned(64)));
  const int64_t padded = keys.padded;
  for (int64_t i0 = 0; i0 < rows.padded; i0 += kLanes) {
    for (int64_t i = 0; i < kLanes; ++i) {
      float* dst = square + i * kMostKeys;
      if (i0 + i >= rows.count) {
        __builtin_memset(dst, 0, sizeof(float) * kMostKeys);
        continue;
      }
      const int64_t offset = rows.head[i0 + i] * p.bias.stride0 + rows.row[i0 + i] * p.bias.stride1;
      for (int64_t run = 0; run < runs.count; ++run)
        widen_operand(p.bias, offset + runs.start[run], runs.length[run], dst + runs.key[run]);
      for (int64_t k = keys.count; k < kMostKeys && k < round_up(padded, kLanes); ++k) dst[k] = 0.0f;
      scale_bias(dst, keys.count);
    }
    int64_t k = 0;
    for (; k + kLanes <= padded; k += kLanes) transpose_square(square + k, kMostKeys, bias + k * kRows + i0, kRows);
    for (; k < padded; ++k)
      for (int64_t i = 0; i < kLanes; ++i) bias[k * kRows + i0 + i] = square[i * kMostKeys + k];
  }
}

// Scales the scores and caps them: what they are multiplied by afterwards is log2(e) alone. `slopes`, where it is given,
// gets the derivative of the capped logits by the logits.
static void cap_scores(const Problem& p, int64_t padded_rows, int64_t count, float* scores, float* slopes) {
  const float factor = p.scale / p.softcap;
  for (int64_t k = 0; k < count; ++k)
    for (int64_t i = 0; i < padded_rows; i += kLanes) {
      const vfloat t = tanh(load(scores + k * kRows + i) * factor);
      store(scores + k * kRows + i, t * p.softcap);
      if (slopes) store(slopes + k * kRows + i, 1.0f - t * t);
    }
}

// A logit of the null slot, capped like the others.
RK_INLINE float cap_logit(const Problem& p, float logit, float* slope = nullptr) {
  if (p.softcap == 0.0f) return logit;
  const float t = tanh(splat(logit / p.softcap))[0];
  if (slope) *slope = 1.0f - t * t;
  return t * p.softcap;
}

// Scales the scores to base 2 and hides from each row what `causal` hides.
static void hide_unseen(const Rows& rows, const Keys& keys, float factor, float* scores) {
  for (int64_t i = 0; i < rows.padded; i += kLanes) {
    vint first, last;
    __builtin_memcpy(&first, rows.first + i, sizeof first);
    __builtin_memcpy(&last, rows.last + i, sizeof last);
    for (int64_t k = 0; k < keys.count; ++k) {
      const vint slot = (int32_t)keys.slot[k] - vint{};
      float* s = scores + k * kRows + i;
      store(s, (first <= slot) & (slot <= last) ? load(s) * factor : splat(-infinity()));
    }
  }
}

// Starts fetching, over about `tiles` register tiles, the key block from `slot` of an item on (none where `slot` is
// negative) and, where `block` is not negative, the rows of that block and where their results go.
template <class T>
RK_INLINE Prefetch make_prefetch(const Problem& p, const Item& item, int64_t slot, int64_t block, const Sizes& z,
                                 int64_t tiles, bool backward) {
  Prefetch f;
  if (item.count == 0) return f;
  const int64_t size = sizeof(T);
  f.slots = slot >= 0 ? least(item.slots - slot, z.keys) : 0;
  f.retrieved = p.retrieved;
  if (f.slots > 0) {
    f.token = slot % p.retrieved;
    f.key = {(const char*)((const T*)p.key + key_offset(p, p.key_stride, item, slot)), p.key_stride[3] * size,
             p.dim * size};
    f.value = {(const char*)((const T*)p.value + key_offset(p, p.value_stride, item, slot)), p.value_stride[3] * size,
               p.dim_value * size};
    f.key_start = f.key.row - f.token * f.key.step;
    f.value_start = f.value.row - f.token * f.value.step;
    f.key_jump = p.key_stride[2] * size;
    f.value_jump = p.value_stride[2] * size;
  }
  if (block >= 0) {
    const BlockStart start = block_start(p, item, block);
    f.rows = start.count;
    f.tokens = item.count, f.neighbours = item.runs;
    f.row_token = start.token, f.neighbour = start.run % item.runs, f.head = start.run / item.runs;
    const int64_t head = item.kv * (p.heads / p.kv_heads);
    const auto strided = [&](const void* data, const int64_t* stride, int64_t dim) {
      const int64_t first = item.b * stride[0] + item.query_chunk * stride[1] + item.query_neighbour * stride[2] +
                            item.first * stride[3] + head * stride[4];
      f.lines[f.streams++] = {(const char*)((const T*)data + first), nullptr, stride[3] * size, stride[2] * size,
                              stride[4] * size, dim * size};
    };
    const auto dense = [&](const void* data, int64_t dim) {  // as the output lies
      const int64_t token = p.heads * dim, neighbour = p.tokens * token, chunk = p.query_neighbours * neighbour;
      const int64_t stride[5] = {p.query_chunks * chunk, chunk, neighbour, token, dim};
      strided(data, stride, dim);
    };
    strided(p.query, p.query_stride, p.dim);
    dense(p.out, p.dim_value);
    if (backward) {
      strided(p.grad_out, p.grad_out_stride, p.dim_value);
      dense(p.grad_query, p.dim);
    }
    f.start_run();
  }
  f.quota = f.slots + f.rows > 0 ? (f.slots + f.rows + tiles - 1) / tiles : 0;
  return f;
}

}  // namespace
}  // namespace RK_NAMESPACE
}  // namespace retro_kernels
