// What the Hopper kernels share: 64 rows of a warpgroup, from a ring of tiles to the output.
#pragma once
#include "hopper.cuh"

namespace retro_kernels {
namespace sm90 {

constexpr int kRows = 64;
constexpr int kPanel = kRows * kPanelRow;  // bytes: 64 rows of 64 numbers
constexpr Shared kNoBuffer = ~Shared{0};

// Place in a ring of `kLength` buffers and the parity of its phase.
template <int kLength>
struct Place {
  int at = 0, parity = 0;
  RK_DEVICE void next() {
    if (++at == kLength) at = 0, parity ^= 1;
  }
};

// The output of a warpgroup's 64 rows into `tile`, for the copy engine to store, and their lse. `largest` and `total`
// are the thread's part of the softmax of its two rows (base 2); `lse` is the place of token 0 in p.lse. A thread holds
// of a product of 64 rows the columns 8 j + 2 (lane % 4) + {0, 1}, of rows 16 warp + lane / 4 and 8 below: numbers 4 j
// + {0, 1} and 4 j + {2, 3}.
template <class T, int kDim>
RK_DEVICE void finish_rows(const Problem& p, Shared tile, int barrier, int first_token, int rows, int64_t lse,
                           float (&out)[kDim / 2], const float (&largest)[2], float (&total)[2]) {
  const int warp = warp_index() % 4, lane = lane_index();
  named_barrier(barrier, 128);  // all have multiplied with what the tile held
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    total[r] += shuffle_xor(total[r], 1);
    total[r] += shuffle_xor(total[r], 2);
    const float inverse = total[r] == 0.0f ? 0.0f : 1.0f / total[r];
    const int row = 16 * warp + lane / 4 + 8 * r, token = first_token + row;
#pragma unroll
    for (int j = 0; j < kDim / 8; ++j)
      *shared_pointer<uint32_t>(tile + j / 8 * kPanel + swizzled(row, j % 8 * 16) + lane % 4 * 4) =
          pack(T(), out[4 * j + 2 * r] * inverse, out[4 * j + 2 * r + 1] * inverse);
    if (lane % 4 == 0 && row < rows && token >= 0 && token < p.tokens)
      p.lse[lse + token * p.lse_stride.token] =
          log_of_sum(largest[r], total[r], log2_fast(total[r]));
  }
  fence_async();
  named_barrier(barrier, 128);
}

}  // namespace sm90
}  // namespace retro_kernels
