// Prints the dynamic shared memory of every kernel's launch at the paper's sizes, for cuda_resources.py: the kernel
// without its element type, a tab, bytes.
#include <cstdio>

#include "decode/attend.cuh"
#include "decode/project.cuh"
#include "sm80/backward.cuh"
#include "sm80/forward.cuh"
#include "sm90/absorbed.cuh"
#include "sm90/backward.cuh"
#include "sm90/forward.cuh"

using namespace retro_kernels;

namespace {

constexpr int kSlots = 256, kWidth = 896;

template <int DIM, int WARPS>
void forward() {
  std::printf("attention_forward<%d, %d>\t%zu\n", DIM, WARPS, sm80::ForwardShape<DIM, WARPS>::shared_bytes(kSlots));
}

template <int DIM, int ROWS, int KEYS>
void backward(const char* one_block) {
  std::printf("attention_backward<%d, %d, %d, %s>\t%zu\n", DIM, ROWS, KEYS, one_block,
              sm80::BackwardShape<DIM, ROWS, KEYS>::shared_bytes(kSlots));
}

template <int DIM>
void both() {
  forward<DIM, 4>();
  forward<DIM, 8>();
  backward<DIM, 64, 64>("true");
  backward<DIM, 64, 64>("false");
  backward<DIM, 128, 32>("true");
}

template <int DIM>
void hopper() {
  std::printf("forward_kernel<%d>\t%zu\n", DIM, sm90::Channel<DIM>::kBytes);
  for (int passes = 0; passes < 3; ++passes)
    std::printf("backward_kernel<%d, %d>\t%zu\n", DIM, passes, sm90::BackwardShape<DIM>::kBytes);
  std::printf("absorbed_kernel<%d, 128>\t%zu\n", DIM, sm90::AbsorbedShape<DIM, 128>::kBytes);
  std::printf("absorbed_kernel<%d, 256>\t%zu\n", DIM, sm90::AbsorbedShape<DIM, 256>::kBytes);
}

// From encoder states, which are wider than a head.
template <int ROWS>
void decoding() {
  const size_t rows = sizeof(float) * ROWS * kWidth;
  std::printf("decode::attend_kernel<%d>\t%zu\n", ROWS, sizeof(decode::AttendShared<ROWS>) + rows);
  for (int type = 0; type < 3; ++type)
    std::printf("decode::project_kernel<%d, %d>\t%zu\n", type, ROWS, sizeof(decode::ProjectShared<ROWS>) + rows);
}

}  // namespace

int main() {
  hopper<64>();
  hopper<128>();
  std::printf("decode::combine_kernel\t0\n");
  decoding<1>();
  decoding<2>();
  decoding<4>();
  decoding<8>();
  both<64>();
  both<96>();
  both<128>();
}
