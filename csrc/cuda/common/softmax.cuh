// The softmax over key tiles that come one after the other, of the two rows that a lane holds in sums of 16 rows.
#pragma once
#include "tile.cuh"

namespace retro_kernels {

constexpr float kLog2E = 1.4426950408889634f, kLn2 = 0.6931471805599453f;

RK_DEVICE float minus_infinity() {
#if !defined(RK_EMULATED)
  return __int_as_float(0xff800000);
#else
  return -INFINITY;
#endif
}

// Scores become logits in base 2 (times scale * log2 e), and those of hidden slots -inf. `visible`: bit i is slot i of
// the tile, whose columns start at `column`.
template <int N>
RK_DEVICE void hide(float (&scores)[N][4], float scale_log2, uint64_t visible) {
  const int first = lane_index() % 4 * 2;
#pragma unroll
  for (int n = 0; n < N; ++n) {
    const uint32_t bits = static_cast<uint32_t>(visible >> (8 * n + first));
#pragma unroll
    for (int e = 0; e < 4; ++e) scores[n][e] = bits >> (e % 2) & 1 ? scores[n][e] * scale_log2 : minus_infinity();
  }
}

struct OnlineSoftmax {
  float maximum[2], sum[2];  // base 2; `sum` is this lane's share until `finish`

  RK_DEVICE OnlineSoftmax() : maximum{minus_infinity(), minus_infinity()}, sum{0.0f, 0.0f} {}

  // Logits (base 2) of a tile become exp2(logit - maximum); `out` is brought to the new maximum.
  template <int N, int M>
  RK_DEVICE void update(float (&logits)[N][4], float (&out)[M][4]) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float top = maximum[half];
#pragma unroll
      for (int n = 0; n < N; ++n) top = fmaxf(top, fmaxf(logits[n][2 * half], logits[n][2 * half + 1]));
      top = fmaxf(top, shuffle_xor(top, 1));
      top = fmaxf(top, shuffle_xor(top, 2));
      const float base = top == minus_infinity() ? 0.0f : top;  // a row that has seen nothing yet
      const float shrink = exp2_fast(maximum[half] - base);
      maximum[half] = top;
      sum[half] *= shrink;
#pragma unroll
      for (int m = 0; m < M; ++m) out[m][2 * half] *= shrink, out[m][2 * half + 1] *= shrink;
#pragma unroll
      for (int n = 0; n < N; ++n)
#pragma unroll
        for (int e = 2 * half; e < 2 * half + 2; ++e) {
          logits[n][e] = exp2_fast(logits[n][e] - base);
          sum[half] += logits[n][e];
        }
    }
  }

  // Afterwards `sum` is the row's; factor[half] is what `out` is to be multiplied by, lse[half] the natural logarithm.
  RK_DEVICE void finish(float (&factor)[2], float (&lse)[2]) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      sum[half] += shuffle_xor(sum[half], 1);
      sum[half] += shuffle_xor(sum[half], 2);
      factor[half] = sum[half] > 0.0f ? 1.0f / sum[half] : 0.0f;
      if (sum[half] != sum[half]) factor[half] = sum[half];  // NaN in visible input stays NaN
      lse[half] = sum[half] == 0.0f ? minus_infinity() : maximum[half] * kLn2 + logf(sum[half]);
    }
  }
};

// Sums of 16 rows x 16 columns, tiles n and n + 1, rounded to T as the left operand of the next product.
template <class T, int N>
RK_DEVICE void as_a(uint32_t (&a)[4], const float (&c)[N][4], int n) {
  a[0] = pack(T(), c[n][0], c[n][1]);
  a[1] = pack(T(), c[n][2], c[n][3]);
  a[2] = pack(T(), c[n + 1][0], c[n + 1][1]);
  a[3] = pack(T(), c[n + 1][2], c[n + 1][3]);
}

}  // namespace retro_kernels
