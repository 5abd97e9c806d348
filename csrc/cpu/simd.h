// Vectors of one instruction-set level. The including file has set
//   RK_LEVEL      0 portable (128-bit vectors, also AArch64), 1 AVX2+FMA+F16C, 2 AVX-512, 3 AVX-512 with BF16,
//                  4 AMX with BF16
//   RK_NAMESPACE  a namespace of its own
// Everything has internal linkage: two levels must never share a symbol, or the linker might keep the copy that the
// running CPU cannot execute. For the same reason no C++ standard header is included here.
#include <stddef.h>
#include <stdint.h>
#if RK_LEVEL >= 1
#include <immintrin.h>
#endif

#define RK_INLINE static inline __attribute__((always_inline))
#if defined(__clang__)
#define RK_UNROLL _Pragma("clang loop unroll(full)")
#else
#define RK_UNROLL _Pragma("GCC unroll 16")
#endif

namespace retro_kernels {
namespace RK_NAMESPACE {
namespace {

#if RK_LEVEL >= 2
constexpr int kLanes = 16;
constexpr int kTileRows = 8;  // 8 x 2 accumulators of 32 registers; 10 loads for 16 multiply-adds
#elif RK_LEVEL == 1
constexpr int kLanes = 8;
constexpr int kTileRows = 4;  // 4 x 2 accumulators of 16 registers
#elif defined(__aarch64__)
constexpr int kLanes = 4;
constexpr int kTileRows = 8;
#else
constexpr int kLanes = 4;
constexpr int kTileRows = 4;
#endif
constexpr int kPanel = 2 * kLanes;  // columns of a register tile

typedef float vfloat __attribute__((vector_size(4 * kLanes)));
typedef int32_t vint __attribute__((vector_size(4 * kLanes)));

RK_INLINE vfloat load(const float* p) {
  vfloat v;
  __builtin_memcpy(&v, p, sizeof v);
  return v;
}
RK_INLINE void store(float* p, vfloat v) { __builtin_memcpy(p, &v, sizeof v); }
RK_INLINE vfloat splat(float x) { return x - vfloat{}; }

// a > b ? a : b, so that b is returned when a or b is NaN
RK_INLINE vfloat larger(vfloat a, vfloat b) {
#if RK_LEVEL >= 2
  return (vfloat)_mm512_max_ps((__m512)a, (__m512)b);
#elif RK_LEVEL == 1
  return (vfloat)_mm256_max_ps((__m256)a, (__m256)b);
#else
  return a > b ? a : b;
#endif
}

// a < b ? a : b, so that b is returned when a or b is NaN
RK_INLINE vfloat smaller(vfloat a, vfloat b) {
#if RK_LEVEL >= 2
  return (vfloat)_mm512_min_ps((__m512)a, (__m512)b);
#elif RK_LEVEL == 1
  return (vfloat)_mm256_min_ps((__m256)a, (__m256)b);
#else
  return a < b ? a : b;
#endif
}

// Whether some lane of a comparison holds.
RK_INLINE bool any_lane(vint v) {
#if RK_LEVEL >= 2
  return _mm512_movepi32_mask((__m512i)v) != 0;
#elif RK_LEVEL == 1
  return _mm256_movemask_ps((__m256)v) != 0;
#else
  return (v[0] | v[1] | v[2] | v[3]) != 0;
#endif
}

RK_INLINE float sum_lanes(vfloat v) {
#if RK_LEVEL >= 2
  return _mm512_reduce_add_ps((__m512)v);
#else
  float x[kLanes];
  store(x, v);
  for (int n = kLanes / 2; n > 0; n /= 2)
    for (int i = 0; i < n; ++i) x[i] += x[i + n];
  return x[0];
#endif
}

// 2^x to 1e-7 before rounding; 0 below 2^-126.5 (and for -inf); NaN stays NaN. x must be below 128. That is for the
// caller to see to: with large logits even the difference to a maximum can be anything once it is contracted to a
// multiply-add, whose product, unlike the maximum's, is not rounded.
RK_INLINE vfloat exp2(vfloat x) {
  const float kRound = 12582912.0f;  // 1.5 * 2^23: adding it leaves the nearest integer in the low bits
  x = larger(splat(-127.0f), x);     // whose power of two has no bits set: 0
  const vfloat shifted = x + kRound;
  const vfloat f = x - (shifted - kRound);
  vfloat p = splat(1.326472406e-3f);
  p = p * f + 9.671512865e-3f;
  p = p * f + 5.550733754e-2f;
  p = p * f + 2.402224208e-1f;
  p = p * f + 6.931469776e-1f;
  p = p * f + 1.0f;
  const vint power = ((vint)shifted << 23) + (127 << 23);
  return p * (vfloat)power;
}

// tanh(x), relative to 1e-7 or so: an odd polynomial near 0, where the difference to 1 would cancel; NaN stays NaN.
RK_INLINE vfloat tanh(vfloat x) {
  const vfloat s = x * x;
  vfloat p = splat(-5.70498872745e-3f);
  p = p * s + 2.06390887954e-2f;
  p = p * s - 5.37397155531e-2f;
  p = p * s + 1.33314422036e-1f;
  p = p * s - 3.33332819422e-1f;
  const vfloat near = x + x * s * p;
  const vfloat bounded = smaller(splat(15.0f), larger(splat(-15.0f), x));  // beyond, tanh rounds to 1
  const vfloat far = 1.0f - 2.0f / (exp2(bounded * 2.885390082f) + 1.0f);
  return s < splat(0.390625f) ? near : x == x ? far : x;
}

// log2(x) to 1e-7 or so for normal x > 0; NaN stays NaN: log2 m = 2 / ln 2 atanh((m - 1) / (m + 1)) for the mantissa m, 0.71 to 1.41
RK_INLINE vfloat log2(vfloat x) {
  const vint bits = (vint)x - 0x3f3504f3;  // of sqrt(1/2)
  const vint power = bits >> 23;
  const vfloat m = (vfloat)((bits & 0x7fffff) + 0x3f3504f3);
  const vfloat t = (m - 1.0f) / (m + 1.0f), s = t * t;
  vfloat p = splat(0.320598898f);
  p = p * s + 0.412198583f;
  p = p * s + 0.577078016f;
  p = p * s + 0.961796694f;
  p = p * s + 2.885390082f;
  return x == x ? p * t + __builtin_convertvector(power, vfloat) : x;
}

RK_INLINE float bits_to_float(uint32_t u) {
  float f;
  __builtin_memcpy(&f, &u, 4);
  return f;
}
RK_INLINE uint32_t float_to_bits(float f) {
  uint32_t u;
  __builtin_memcpy(&u, &f, 4);
  return u;
}

struct half_t {
  uint16_t bits;
};
struct bfloat_t {
  uint16_t bits;
};

RK_INLINE float widen(float x) { return x; }
RK_INLINE float widen(bfloat_t x) { return bits_to_float((uint32_t)x.bits << 16); }
RK_INLINE float widen(half_t x) {
#if RK_LEVEL >= 1
  return _cvtsh_ss(x.bits);
#elif defined(__aarch64__)
  __fp16 h;
  __builtin_memcpy(&h, &x, 2);
  return (float)h;
#else
  const uint32_t sign = (uint32_t)(x.bits & 0x8000u) << 16;
  const uint32_t exponent = (x.bits >> 10) & 31u, mantissa = x.bits & 1023u;
  if (exponent == 31u) return bits_to_float(sign | 0x7f800000u | (mantissa << 13));
  if (exponent == 0u) {
    const float subnormal = (float)mantissa * 5.9604644775390625e-8f;  // 2^-24
    return sign ? -subnormal : subnormal;
  }
  return bits_to_float(sign | ((exponent + 112u) << 23) | (mantissa << 13));
#endif
}
RK_INLINE void narrow(float x, float* out) { *out = x; }
RK_INLINE void narrow(float x, bfloat_t* out) {
  const uint32_t u = float_to_bits(x);
  out->bits = x != x ? 0x7fc0u : (uint16_t)((u + 0x7fffu + ((u >> 16) & 1u)) >> 16);
}
RK_INLINE void narrow(float x, half_t* out) {
#if RK_LEVEL >= 1
  out->bits = (uint16_t)_cvtss_sh(x, 0);
#elif defined(__aarch64__)
  const __fp16 h = (__fp16)x;
  __builtin_memcpy(out, &h, 2);
#else
  const uint32_t u = float_to_bits(x), magnitude = u & 0x7fffffffu;
  uint32_t h;
  if (magnitude > 0x7f800000u) {
    h = 0x7e00u;
  } else if (magnitude >= 0x477ff000u) {  // rounds to 65520 or more
    h = 0x7c00u;
  } else if (magnitude >= 0x38800000u) {
    h = (magnitude + 0xfffu + ((magnitude >> 13) & 1u) - 0x38000000u) >> 13;
  } else {  // subnormal: adding 0.5 rounds to a multiple of 2^-24, the integer is in the low bits
    h = float_to_bits(bits_to_float(magnitude) + 0.5f) - 0x3f000000u;
  }
  out->bits = (uint16_t)(h | ((u >> 16) & 0x8000u));
#endif
}

#if RK_LEVEL >= 2
RK_INLINE vfloat widen_vector(const bfloat_t* p) {
  return (vfloat)_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)p)), 16);
}
RK_INLINE vfloat widen_vector(const half_t* p) {
  return (vfloat)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p));
}
RK_INLINE void narrow_vector(vfloat v, half_t* p) {
  _mm256_storeu_si256((__m256i*)p, _mm512_cvtps_ph((__m512)v, 0));
}
#if RK_LEVEL >= 3
RK_INLINE void narrow_vector(vfloat v, bfloat_t* p) {
  const __m256bh h = _mm512_cvtneps_pbh((__m512)v);
  __builtin_memcpy(p, &h, 32);
}
#else
RK_INLINE void narrow_vector(vfloat v, bfloat_t* p) {
  const __m512i u = (__m512i)v;
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(u, 16), _mm512_set1_epi32(1));
  __m512i r = _mm512_srli_epi32(_mm512_add_epi32(_mm512_add_epi32(u, _mm512_set1_epi32(0x7fff)), odd), 16);
  r = _mm512_mask_mov_epi32(r, _mm512_cmp_ps_mask((__m512)v, (__m512)v, _CMP_UNORD_Q), _mm512_set1_epi32(0x7fc0));
  _mm256_storeu_si256((__m256i*)p, _mm512_cvtepi32_epi16(r));
}
#endif
#else
template <class T>
RK_INLINE vfloat widen_vector(const T* p) {
  vfloat v;
  for (int i = 0; i < kLanes; ++i) v[i] = widen(p[i]);
  return v;
}
template <class T>
RK_INLINE void narrow_vector(vfloat v, T* p) {
  for (int i = 0; i < kLanes; ++i) narrow(v[i], p + i);
}
#endif
RK_INLINE vfloat widen_vector(const float* p) { return load(p); }
RK_INLINE void narrow_vector(vfloat v, float* p) { store(p, v); }

#if RK_LEVEL >= 3
// 32 bf16 of `low` and `high` in turn: low[0], high[0], low[1], ...
RK_INLINE __m512i in_turn(__m512i both) {
  const __m512i order = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22, 6, 21,
                                         5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
  return _mm512_permutexvar_epi16(order, both);
}
// Pairs (low[i], high[i]), rounded to bf16
RK_INLINE void store_pairs(vfloat low, vfloat high, float* p) {
  _mm512_storeu_si512(p, in_turn((__m512i)_mm512_cvtne2ps_pbh((__m512)high, (__m512)low)));
}
#endif

// acc += a * b where an element is one float, or (kPairs) two bf16 whose products are both added
template <bool kPairs>
RK_INLINE vfloat multiply_add(vfloat acc, float a, vfloat b) {
#if RK_LEVEL >= 3
  if constexpr (kPairs)
    return (vfloat)_mm512_dpbf16_ps((__m512)acc, (__m512bh)_mm512_set1_ps(a), (__m512bh)b);
  else
#endif
    return acc + a * b;
}

// b[c * ldb + r] = a[r * lda + c] for a square of kLanes x kLanes 32-bit elements
RK_INLINE void transpose_square(const float* a, int64_t lda, float* b, int64_t ldb) {
#if RK_LEVEL >= 2
  __m512 r[16], t[16];
  RK_UNROLL for (int i = 0; i < 16; ++i) r[i] = _mm512_loadu_ps(a + i * lda);
  RK_UNROLL for (int i = 0; i < 16; i += 2) {
    t[i] = _mm512_unpacklo_ps(r[i], r[i + 1]);
    t[i + 1] = _mm512_unpackhi_ps(r[i], r[i + 1]);
  }
  RK_UNROLL for (int i = 0; i < 16; i += 4) {
    r[i] = _mm512_castpd_ps(_mm512_unpacklo_pd(_mm512_castps_pd(t[i]), _mm512_castps_pd(t[i + 2])));
    r[i + 1] = _mm512_castpd_ps(_mm512_unpackhi_pd(_mm512_castps_pd(t[i]), _mm512_castps_pd(t[i + 2])));
    r[i + 2] = _mm512_castpd_ps(_mm512_unpacklo_pd(_mm512_castps_pd(t[i + 1]), _mm512_castps_pd(t[i + 3])));
    r[i + 3] = _mm512_castpd_ps(_mm512_unpackhi_pd(_mm512_castps_pd(t[i + 1]), _mm512_castps_pd(t[i + 3])));
  }
  RK_UNROLL for (int i = 0; i < 4; ++i) {
    t[i] = _mm512_shuffle_f32x4(r[i], r[i + 4], 0x88);
    t[i + 4] = _mm512_shuffle_f32x4(r[i], r[i + 4], 0xdd);
    t[i + 8] = _mm512_shuffle_f32x4(r[i + 8], r[i + 12], 0x88);
    t[i + 12] = _mm512_shuffle_f32x4(r[i + 8], r[i + 12], 0xdd);
  }
  RK_UNROLL for (int i = 0; i < 8; ++i) {
    _mm512_storeu_ps(b + i * ldb, _mm512_shuffle_f32x4(t[i], t[i + 8], 0x88));
    _mm512_storeu_ps(b + (i + 8) * ldb, _mm512_shuffle_f32x4(t[i], t[i + 8], 0xdd));
  }
#else
  for (int i = 0; i < kLanes; ++i)
    for (int j = 0; j < kLanes; ++j) b[i * ldb + j] = a[j * lda + i];
#endif
}

}  // namespace
}  // namespace RK_NAMESPACE
}  // namespace retro_kernels
