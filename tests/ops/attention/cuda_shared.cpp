// Prints the dynamic shared memory of every kernel's launch at the paper's sizes, for cuda_resources.py: the kernel
// without its element type, a tab, bytes.
#include <cstdio>

#include "sm80/backward.cuh"
#include "sm80/forward.cuh"

using namespace retro_kernels;

namespace {

constexpr int kSlots = 256;

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

}  // namespace

int main() {
  both<64>();
  both<96>();
  both<128>();
}
