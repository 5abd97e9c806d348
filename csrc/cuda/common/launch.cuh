// Launching a kernel: every CUDA call is checked, and a failure is one sentence. In the emulator the blocks run here.
#pragma once
#include <atomic>
#include <stdexcept>
#include <string>

#include "../device.h"
#include "platform.cuh"
#include "problem.h"

namespace retro_kernels {

constexpr int kMostCluster = 8;  // blocks that every GPU with clusters takes
// From this virtual architecture on wait_for_predecessor() waits (numbers.cuh): a kernel may overlap its predecessor.
constexpr int kOldestThatWaits = 90;

#if !defined(RK_EMULATED)

inline void check(cudaError_t status, const char* what) {
  if (status != cudaSuccess)
    throw std::runtime_error(std::string("retro_kernels: ") + what + " failed: " + cudaGetErrorString(status));
}

// Beyond 48 KiB a kernel must be allowed its shared memory, once per device; what was allowed is remembered.
template <auto KERNEL>
void allow_shared(const char* name, size_t bytes) {
  if (bytes <= 48 << 10) return;
  static std::atomic<size_t> allowed[64];
  int device = 0;
  check(cudaGetDevice(&device), "cudaGetDevice");
  if (device < 64 && allowed[device].load(std::memory_order_relaxed) >= bytes) return;
  int limit = 0;
  check(cudaDeviceGetAttribute(&limit, cudaDevAttrMaxSharedMemoryPerBlockOptin, device), "cudaDeviceGetAttribute");
  if (static_cast<size_t>(limit) < bytes)
    throw std::runtime_error(std::string("retro_kernels: ") + name + " needs " + std::to_string(bytes) +
                             " bytes of shared memory and this GPU has " + std::to_string(limit));
  check(cudaFuncSetAttribute(reinterpret_cast<const void*>(KERNEL), cudaFuncAttributeMaxDynamicSharedMemorySize,
                             static_cast<int>(bytes)),
        "cudaFuncSetAttribute");
  if (device < 64) allowed[device].store(bytes, std::memory_order_relaxed);
}

// The virtual architecture (80 for compute_80) whose code the driver has loaded for KERNEL: the device may be newer.
template <auto KERNEL>
int compiled_for() {
  static std::atomic<int> known[64];
  int device = 0, found = 0;
  check(cudaGetDevice(&device), "cudaGetDevice");
  if (device < 64 && (found = known[device].load(std::memory_order_relaxed)) > 0) return found;
  cudaFuncAttributes attributes{};
  check(cudaFuncGetAttributes(&attributes, reinterpret_cast<const void*>(KERNEL)), "cudaFuncGetAttributes");
  if (device < 64) known[device].store(attributes.ptxVersion, std::memory_order_relaxed);
  return attributes.ptxVersion;
}

// The blocks of a launch, with room for two attributes.
struct LaunchConfig {
  cudaLaunchConfig_t config{};
  cudaLaunchAttribute attributes[2]{};

  LaunchConfig(int64_t blocks, int threads, size_t shared_bytes, Stream stream, bool overlap, int cluster) {
    config.gridDim = dim3(static_cast<unsigned>(blocks));
    config.blockDim = dim3(threads);
    config.dynamicSmemBytes = shared_bytes;
    config.stream = static_cast<cudaStream_t>(stream);
    config.attrs = attributes;
    if (overlap) {
      attributes[config.numAttrs].id = cudaLaunchAttributeProgrammaticStreamSerialization;
      attributes[config.numAttrs++].val.programmaticStreamSerializationAllowed = 1;
    }
    if (cluster > 1) {
      attributes[config.numAttrs].id = cudaLaunchAttributeClusterDimension;
      attributes[config.numAttrs++].val.clusterDim = {static_cast<unsigned>(cluster), 1, 1};
    }
  }
};

// KERNEL is a template argument so that each has a flag of its own. `overlap`: it may start before the kernel before it
// in the stream has ended (programmatic dependent launch), for which it waits itself where its code can. `cluster`: so
// many adjacent blocks run together.
template <auto KERNEL, class Argument>
void launch(KernelSet set, const char* name, int64_t blocks, int threads, size_t shared_bytes, Stream stream, const Argument& argument,
            bool overlap = false, int cluster = 1) {
  if (blocks == 0) return;
  if (blocks > INT32_MAX)
    throw std::runtime_error(std::string("retro_kernels: ") + name + " needs " + std::to_string(blocks) +
                             " blocks, and CUDA takes 2^31 - 1");
  allow_shared<KERNEL>(name, shared_bytes);
  void* arguments[] = {const_cast<Argument*>(&argument)};
  overlap = overlap && compiled_for<KERNEL>() >= kOldestThatWaits;
  const LaunchConfig launched(blocks, threads, shared_bytes, stream, overlap, cluster);
  check(cudaLaunchKernelExC(&launched.config, reinterpret_cast<const void*>(KERNEL), arguments), name);
  count_launch(set, overlap);
}

// How many clusters the device runs at a time; 0 where it runs none so large.
template <auto KERNEL>
int clusters_at_a_time(const char* name, int threads, size_t shared_bytes, int cluster) {
  static std::atomic<int> known[64][kMostCluster + 1];  // that number plus one
  int device = 0, found = 0;
  check(cudaGetDevice(&device), "cudaGetDevice");
  if (device < 64 && (found = known[device][cluster].load(std::memory_order_relaxed)) > 0) return found - 1;
  allow_shared<KERNEL>(name, shared_bytes);
  const LaunchConfig launched(cluster, threads, shared_bytes, nullptr, false, cluster);
  check(cudaOccupancyMaxActiveClusters(&found, reinterpret_cast<const void*>(KERNEL), &launched.config),
        "cudaOccupancyMaxActiveClusters");
  if (device < 64) known[device][cluster].store(found + 1, std::memory_order_relaxed);
  return found;
}

#else

template <auto KERNEL, class Argument>
void launch(KernelSet set, const char* name, int64_t blocks, int threads, size_t shared_bytes, Stream,
            const Argument& argument, bool overlap = false, int cluster = 1) {
  if (blocks == 0) return;
  overlap = overlap && emulator::compiled_for() >= kOldestThatWaits;
  count_launch(set, overlap);
  if (set != kSetSm90 && shared_bytes > 99 << 10)
    throw std::runtime_error(std::string("retro_kernels: ") + name + " in the emulator: " +
                             std::to_string(shared_bytes) + " bytes of shared memory, and sm_86 has 99 KiB");
  try {
    emulator::launch(blocks, threads, shared_bytes, [&] { KERNEL(argument); }, cluster, overlap);
  } catch (const emulator::Fault& fault) {
    throw std::runtime_error(std::string("retro_kernels: ") + name + " in the emulator: " + fault.what());
  }
}

template <auto KERNEL>
int clusters_at_a_time(const char*, int, size_t, int) {
  return 2;
}

#endif

}  // namespace retro_kernels
