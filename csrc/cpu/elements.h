// Rows of numbers: widened to fp32, narrowed, rotated, added up.
#pragma once
#include "problem.h"
#include "products.h"

namespace retro_kernels {
namespace RK_NAMESPACE {
namespace {

constexpr int kMaxDim = 256;
constexpr float kLog2e = 1.4426950408889634f;
constexpr float kLn2 = 0.6931471805599453f;
constexpr float kMost = 3.40282347e38f;  // the largest finite number

// dst[0, padded) fp32, zero beyond n
template <class T>
RK_INLINE void widen_row(const T* src, int64_t n, float* dst, int64_t padded) {
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) store(dst + i, widen_vector(src + i));
  for (; i < n; ++i) dst[i] = widen(src[i]);
  for (; i < padded; ++i) dst[i] = 0.0f;
}

template <class T>
RK_INLINE void narrow_row(const float* src, int64_t n, float factor, T* dst) {
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) narrow_vector(load(src + i) * factor, dst + i);
  for (; i < n; ++i) narrow(src[i] * factor, dst + i);
}

// The same for a row that is not read again soon: whole cache lines are written past the cache, unread.
template <class T>
RK_INLINE void stream_row(const float* src, int64_t n, float factor, T* dst) {
#if RK_LEVEL >= 2
  constexpr int64_t kStep = 64 / (int64_t)sizeof(T);
  if (((uintptr_t)dst & 63) == 0 && n % kStep == 0) {
    for (int64_t i = 0; i < n; i += kStep) {
      if constexpr (sizeof(T) == 4) {
        _mm512_stream_ps((float*)(dst + i), (__m512)(load(src + i) * factor));
      } else {
        T line[kStep] __attribute__((aligned(64)));
        narrow_vector(load(src + i) * factor, line);
        narrow_vector(load(src + i + kLanes) * factor, line + kLanes);
        _mm512_stream_si512((__m512i*)(dst + i), _mm512_load_si512(line));
      }
    }
    return;
  }
#endif
  narrow_row(src, n, factor, dst);
}

static void widen_operand(const Operand& o, int64_t offset, int64_t n, float* dst) {
  if (o.type == kFloat32)
    widen_row((const float*)o.data + offset, n, dst, n);
  else if (o.type == kFloat16)
    widen_row((const half_t*)o.data + offset, n, dst, n);
  else
    widen_row((const bfloat_t*)o.data + offset, n, dst, n);
}

// Turns x by the table's row, or back with `direction` -1.
static void rotate(float* x, const Operand& cosine, const Operand& sine, int64_t row, int64_t width, bool interleaved,
                   float direction) {
  float c[kMaxDim / 2], s[kMaxDim / 2];
  widen_operand(cosine, row * cosine.stride0, width, c);
  widen_operand(sine, row * sine.stride0, width, s);
  if (interleaved) {
    for (int64_t j = 0; j < width; ++j) {
      const float a = x[2 * j], b = x[2 * j + 1], t = s[j] * direction;
      x[2 * j] = a * c[j] - b * t;
      x[2 * j + 1] = b * c[j] + a * t;
    }
  } else {
    for (int64_t j = 0; j < width; ++j) {
      const float a = x[j], b = x[j + width], t = s[j] * direction;
      x[j] = a * c[j] - b * t;
      x[j + width] = b * c[j] + a * t;
    }
  }
}

// The rows' log-sum-exp from the maximum and the sum of their scores in base 2: +inf where a logit is, NaN where one is
// NaN; not of rows whose sum is 0. Without `log_sum` the natural one; with it the maximum and the logarithm of the sum in
// base 2, see retro_kernels/ops/attention/common.py.
static void log_sum_exp(int64_t padded_rows, const float* highest, const float* sum, float* lse, float* log_sum) {
  for (int64_t i = 0; i < padded_rows; i += kLanes) {
    const vfloat high = load(highest + i), log = log2(load(sum + i));
    const vint unbounded = high == splat(infinity()), nan = log != log;
    if (log_sum) {
      store(lse + i, unbounded ? high : nan ? log : high);
      store(log_sum + i, unbounded | nan ? vfloat{} : log);
    } else {
      store(lse + i, unbounded ? high : (high + log) * kLn2);
    }
  }
}

// What is finite stays finite.
RK_INLINE float in_base_2(float x) {
  const float y = x * kLog2e;
  return x - x != 0.0f ? x : y > kMost ? kMost : y < -kMost ? -kMost : y;
}

RK_INLINE void add_scaled(float* x, float factor, const float* y, int64_t n) {
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) store(x + i, load(x + i) + factor * load(y + i));
  for (; i < n; ++i) x[i] += factor * y[i];
}

template <class T>
RK_INLINE float dot(const T* x, const T* y, int64_t n) {
  vfloat sum = {};
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) sum += widen_vector(x + i) * widen_vector(y + i);
  if (i < n) {  // as if both were padded with zeros: a row gives the same bits packed and as it is
    T first[kLanes] = {}, second[kLanes] = {};
    __builtin_memcpy(first, x + i, (n - i) * sizeof(T));
    __builtin_memcpy(second, y + i, (n - i) * sizeof(T));
    sum += widen_vector(first) * widen_vector(second);
  }
  return sum_lanes(sum);
}

}  // namespace
}  // namespace RK_NAMESPACE
}  // namespace retro_kernels
