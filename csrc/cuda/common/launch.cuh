// Launching a kernel: every CUDA call is checked, and a failure is one sentence. In the emulator the blocks run here.
#pragma once
#include <atomic>
#include <stdexcept>
#include <string>

#include "platform.cuh"
#include "problem.h"

namespace retro_kernels {

#if !defined(RK_EMULATED)

inline void check(cudaError_t status, const char* what) {
  if (status != cudaSuccess)
    throw std::runtime_error(std::string("retro_kernels: ") + what + " failed: " + cudaGetErrorString(status));
}

// KERNEL is a template argument so that each has a flag of its own. `overlap`: it may start before the kernel before it in
// the stream has ended (programmatic dependent launch), and waits for that itself.
template <auto KERNEL, class Argument>
void launch(const char* name, int64_t blocks, int threads, size_t shared_bytes, Stream stream, const Argument& argument,
            bool overlap = false) {
  if (blocks == 0) return;
  if (blocks > INT32_MAX)
    throw std::runtime_error(std::string("retro_kernels: ") + name + " needs " + std::to_string(blocks) +
                             " blocks, and CUDA takes 2^31 - 1");
  // Beyond 48 KiB a kernel must be allowed its shared memory, once per device; what was allowed is remembered.
  if (shared_bytes > 48 << 10) {
    static std::atomic<size_t> allowed[64];
    int device = 0;
    check(cudaGetDevice(&device), "cudaGetDevice");
    if (device >= 64 || allowed[device].load(std::memory_order_relaxed) < shared_bytes) {
      int limit = 0;
      check(cudaDeviceGetAttribute(&limit, cudaDevAttrMaxSharedMemoryPerBlockOptin, device), "cudaDeviceGetAttribute");
      if (static_cast<size_t>(limit) < shared_bytes)
        throw std::runtime_error(std::string("retro_kernels: ") + name + " needs " + std::to_string(shared_bytes) +
                                 " bytes of shared memory and this GPU has " + std::to_string(limit));
      check(cudaFuncSetAttribute(reinterpret_cast<const void*>(KERNEL), cudaFuncAttributeMaxDynamicSharedMemorySize,
                                 static_cast<int>(shared_bytes)),
            "cudaFuncSetAttribute");
      if (device < 64) allowed[device].store(shared_bytes, std::memory_order_relaxed);
    }
  }
  void* arguments[] = {const_cast<Argument*>(&argument)};
  cudaLaunchAttribute attribute{};
  attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attribute.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>(blocks));
  config.blockDim = dim3(threads);
  config.dynamicSmemBytes = shared_bytes;
  config.stream = static_cast<cudaStream_t>(stream);
  config.attrs = &attribute;
  config.numAttrs = overlap ? 1 : 0;
  check(cudaLaunchKernelExC(&config, reinterpret_cast<const void*>(KERNEL), arguments), name);
}

#else

template <auto KERNEL, class Argument>
void launch(const char* name, int64_t blocks, int threads, size_t shared_bytes, Stream, const Argument& argument,
            bool = false) {
  try {
    emulator::launch(blocks, threads, shared_bytes, [&] { KERNEL(argument); });
  } catch (const emulator::Fault& fault) {
    throw std::runtime_error(std::string("retro_kernels: ") + name + " in the emulator: " + fault.what());
  }
}

#endif

}  // namespace retro_kernels
