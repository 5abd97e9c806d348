// The softmax over key tiles that come one after the other, of the two rows that a lane holds in sums of 16 rows.
//
// Of what is not finite it makes what PyTorch's does: a logit that is NaN makes its row's output, lse and gradients NaN,
// one that is inf its output and gradients, with an lse of inf. An lse of -inf says that a row saw nothing, and no other
// value says so.
#pragma once
#include "tile.cuh"

namespace retro_kernels {

constexpr float kLog2E = 1.4426950408889634f, kLn2 = 0.6931471805599453f;

RK_DEVICE float bits_to_float(uint32_t bits) {
#if !defined(RK_EMULATED)
  return __uint_as_float(bits);
#else
  return emulator::float_of_bits(bits);
#endif
}
RK_DEVICE float infinity() { return bits_to_float(0x7f800000u); }
RK_DEVICE float minus_infinity() { return bits_to_float(0xff800000u); }
RK_DEVICE float not_a_number() { return bits_to_float(0x7fc00000u); }

// What is subtracted from the logits of a row (base 2), the largest of which is `largest`, before exp2 takes them.
RK_DEVICE float base_of(float largest) { return largest == minus_infinity() ? 0.0f : largest; }  // -inf - -inf is NaN

// The natural logarithm of a row's sum, which is 2^largest times `total`; log2_total is total's.
RK_DEVICE float log_of_sum(float largest, float total, float log2_total) {
  if (total == 0.0f) return minus_infinity();
  return largest == infinity() ? largest : kLn2 * (largest + log2_total);
}

// What the backward subtracts from a row's logits (base 2). inf marks a row that saw nothing or is not there. Where a
// logit was inf all weights are NaN.
constexpr float kNothing = __builtin_huge_valf();
RK_DEVICE float shift_of(float lse) {
  return lse == minus_infinity() ? kNothing : lse == infinity() ? not_a_number() : lse * kLog2E;
}

// Scores become logits in base 2 (times scale * log2 e), and those of hidden slots -inf. `visible`: bit i is slot i of
// the tile, whose columns start at `column`.
template <int N>
RK_DEVICE void hide(float (&scores)[N][4], float scale_log2, uint64_t visible) {
  const uint64_t mine = visible >> (lane_index() % 4 * 2);
#pragma unroll
  for (int n = 0; n < N; ++n)
#pragma unroll
    for (int e = 0; e < 4; ++e)
      scores[n][e] = mine >> (8 * n + e % 2) & 1 ? multiply_rounded(scores[n][e], scale_log2) : minus_infinity();
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
      for (int n = 0; n < N; ++n) top = larger(top, larger(logits[n][2 * half], logits[n][2 * half + 1]));
      top = larger(top, shuffle_xor(top, 1));
      top = larger(top, shuffle_xor(top, 2));
      const float base = base_of(top);
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
      factor[half] = sum[half] == 0.0f ? 0.0f : 1.0f / sum[half];
      lse[half] = log_of_sum(maximum[half], sum[half], log2f(sum[half]));
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
