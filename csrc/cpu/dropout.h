// Which probabilities dropout keeps: Philox4x32-7 as in retro_kernels/ops/dropout.py. Rows run down the lanes;
// one evaluation serves 8 neighbouring slots of every lane's row.
#pragma once
#include "layout.h"

namespace retro_kernels {
namespace RK_NAMESPACE {
namespace {

typedef uint32_t vuint __attribute__((vector_size(4 * kLanes)));

// The low and the high words of x * multiplier.
RK_INLINE void wide_product(vuint x, uint32_t multiplier, vuint* low, vuint* high) {
#if RK_LEVEL >= 2
  const __m512i m = _mm512_set1_epi32((int)multiplier);
  const __m512i even = _mm512_mul_epu32((__m512i)x, m), odd = _mm512_mul_epu32(_mm512_srli_epi64((__m512i)x, 32), m);
  *low = (vuint)_mm512_mask_blend_epi32(0xaaaa, even, _mm512_slli_epi64(odd, 32));
  *high = (vuint)_mm512_mask_blend_epi32(0xaaaa, _mm512_srli_epi64(even, 32), odd);
#elif RK_LEVEL == 1
  const __m256i m = _mm256_set1_epi32((int)multiplier);
  const __m256i even = _mm256_mul_epu32((__m256i)x, m), odd = _mm256_mul_epu32(_mm256_srli_epi64((__m256i)x, 32), m);
  *low = (vuint)_mm256_blend_epi32(even, _mm256_slli_epi64(odd, 32), 0xaa);
  *high = (vuint)_mm256_blend_epi32(_mm256_srli_epi64(even, 32), odd, 0xaa);
#else
  for (int i = 0; i < kLanes; ++i) {
    const uint64_t product = (uint64_t)x[i] * multiplier;
    (*low)[i] = (uint32_t)product;
    (*high)[i] = (uint32_t)(product >> 32);
  }
#endif
}

RK_INLINE void philox(uint64_t seed, uint32_t count, vuint place, vuint head, vuint word[4]) {
  vuint c0 = count - vuint{}, c1 = place, c2 = head, c3 = {};
  uint32_t k0 = (uint32_t)seed, k1 = (uint32_t)(seed >> 32);
  RK_UNROLL for (int round = 0; round < 7; ++round) {
    vuint low0, high0, low1, high1;
    wide_product(c0, 0xd2511f53u, &low0, &high0);
    wide_product(c2, 0xcd9e8d57u, &low1, &high1);
    c0 = high1 ^ c1 ^ k0;
    c1 = low1;
    c2 = high0 ^ c3 ^ k1;
    c3 = low0;
    k0 += 0x9e3779b9u;
    k1 += 0xbb67ae85u;
  }
  word[0] = c0, word[1] = c1, word[2] = c2, word[3] = c3;
}

// Bit i: lane i's lot is at least the threshold.
RK_INLINE uint64_t drawn(vuint lot, uint32_t threshold) {
#if RK_LEVEL >= 2
  return _mm512_cmpge_epu32_mask((__m512i)lot, _mm512_set1_epi32((int)threshold));
#elif RK_LEVEL == 1
  return (uint64_t)_mm256_movemask_ps((__m256)(lot >= (threshold - vuint{})));
#else
  uint64_t bits = 0;
  for (int i = 0; i < kLanes; ++i) bits |= (uint64_t)(lot[i] >= threshold) << i;
  return bits;
#endif
}

RK_INLINE vuint load_words(const uint32_t* p) {
  vuint v;
  __builtin_memcpy(&v, p, sizeof v);
  return v;
}

// kept[k]: bit i says whether row i keeps key k.
static void draw_keys(const Problem& p, const Rows& rows, const Keys& keys, uint64_t* kept) {
  for (int64_t k = 0; k < keys.count;) {
    const int64_t count = keys.slot[k] / 8;
    int64_t end = k;
    for (; end < keys.count && keys.slot[end] / 8 == count; ++end) kept[end] = 0;
    for (int64_t i = 0; i < rows.padded; i += kLanes) {
      vuint word[4];
      philox(p.seed, (uint32_t)count, load_words(rows.place + i), load_words(rows.head_count + i), word);
      for (int64_t j = k; j < end; ++j) {
        const int64_t s = keys.slot[j] % 8;
        const vuint lot = s % 2 ? word[s / 2] >> 16 : word[s / 2] & 0xffffu;
        kept[j] |= drawn(lot, p.threshold) << i;
      }
    }
    k = end;
  }
}

// The same for the null slot.
static uint64_t draw_null(const Problem& p, const Rows& rows) {
  uint64_t kept = 0;
  for (int64_t i = 0; i < rows.padded; i += kLanes) {
    vuint word[4];
    philox(p.seed, 0xffffffffu, load_words(rows.place + i), load_words(rows.head_count + i), word);
    kept |= drawn(word[0] & 0xffffu, p.threshold) << i;
  }
  return kept;
}

// Zero in the lanes whose bit is not set.
RK_INLINE vfloat keep_lanes(vfloat x, uint64_t bits) {
#if RK_LEVEL >= 2
  return (vfloat)_mm512_maskz_mov_ps((__mmask16)bits, (__m512)x);
#else
#if RK_LEVEL == 1
  const vint lane = {1, 2, 4, 8, 16, 32, 64, 128};
#else
  const vint lane = {1, 2, 4, 8};
#endif
  return (((int32_t)(bits & 0xff) - vint{}) & lane) != 0 ? x : vfloat{};
#endif
}

}  // namespace
}  // namespace RK_NAMESPACE
}  // namespace retro_kernels
