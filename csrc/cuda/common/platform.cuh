// What differs between nvcc and the emulator's host compiler: the words that mark kernels, indices, shared memory.
#pragma once
#include <stddef.h>
#include <stdint.h>

#if !defined(RK_EMULATED)
#include <cuda_runtime.h>
#define RK_DEVICE __device__ __forceinline__
#define RK_HOST_DEVICE __host__ __device__ __forceinline__
#define RK_KERNEL(threads, blocks) __global__ void __launch_bounds__(threads, blocks)
#define RK_PARAMETER const __grid_constant__
#else
#include <cmath>
#include <type_traits>

#include "../emulator/emulator.h"
#define RK_DEVICE inline
#define RK_HOST_DEVICE inline
#define RK_KERNEL(threads, blocks) void
#define RK_PARAMETER const
#endif

namespace retro_kernels {

// An address in the block's dynamic shared memory: bytes from its base, which is aligned to 1024.
using Shared = uint32_t;

RK_HOST_DEVICE constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

#if !defined(RK_EMULATED)

RK_DEVICE int thread_index() { return threadIdx.x; }
RK_DEVICE unsigned block_index() { return blockIdx.x; }

RK_DEVICE char* shared_base() {
  extern __shared__ __align__(1024) char memory[];
  return memory;
}

template <class X>
RK_DEVICE X* shared_pointer(Shared address) {
  return reinterpret_cast<X*>(shared_base() + address);
}

RK_DEVICE uint32_t shared_address(Shared address) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(shared_base())) + address;
}

#else

inline int thread_index() { return emulator::current()->running().thread; }
inline unsigned block_index() { return emulator::current()->index; }

// An array's first element is checked, not its length: what lies beyond shared memory is found by the guards. Who asks
// for anything but const is about to write it.
template <class X>
X* shared_pointer(Shared address) {
  if (!std::is_const_v<X> && sizeof(X) <= 16) emulator::current()->written(address, sizeof(X));
  return reinterpret_cast<X*>(emulator::current()->shared(address, sizeof(X), alignof(X)));
}

#endif

RK_DEVICE int lane_index() { return thread_index() % 32; }
RK_DEVICE int warp_index() { return thread_index() / 32; }

}  // namespace retro_kernels
