// Single numbers, prefetches and programmatic dependent launch.
#pragma once
#include "softmax.cuh"

namespace retro_kernels {

#if defined(__CUDACC__)

RK_DEVICE float log2_fast(float x) {
  float y;
  asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
// Asks for the line of an address into the L2 cache.
RK_DEVICE void prefetch(const void* p) { asm volatile("prefetch.global.L2 [%0];" ::"l"(p)); }

// Programmatic dependent launch, from sm_90 on: the next kernel of the stream may start when all blocks have said so, and
// sees what this one wrote only after its own wait_for_predecessor().
RK_DEVICE void let_successor_start() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}
RK_DEVICE void wait_for_predecessor() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

#else

inline float log2_fast(float x) { return std::log2(x); }
inline void prefetch(const void*) {}
inline void let_successor_start() {}
inline void wait_for_predecessor() { emulator::wait_for_predecessor(); }

#endif

RK_DEVICE float half_to_float(uint32_t bits) {
  float low, high;
  unpack(Float16(), bits & 0xffffu, low, high);
  return low;
}

}  // namespace retro_kernels
