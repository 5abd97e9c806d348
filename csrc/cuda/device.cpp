#include "device.h"

#include <atomic>
#include <stdexcept>

#if !defined(RK_EMULATED)
#include <cuda_runtime_api.h>
#endif

namespace retro_kernels {
namespace {

std::atomic<int> named{0};

}  // namespace

int compute_capability() {
#if defined(RK_EMULATED)
  return 0;
#else
  static std::atomic<int> known[64];
  int device = 0;
  const auto check = [](cudaError_t status, const char* what) {
    if (status != cudaSuccess)
      throw std::runtime_error(std::string("retro_kernels: ") + what + " failed: " + cudaGetErrorString(status));
  };
  check(cudaGetDevice(&device), "cudaGetDevice");
  if (device < 64 && known[device].load(std::memory_order_relaxed)) return known[device].load(std::memory_order_relaxed);
  int major = 0, minor = 0;
  check(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device), "cudaDeviceGetAttribute");
  check(cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device), "cudaDeviceGetAttribute");
  if (device < 64) known[device].store(10 * major + minor, std::memory_order_relaxed);
  return 10 * major + minor;
#endif
}

Kernels chosen_kernels() {
  const int name = named.load(std::memory_order_relaxed);
  if (name) return static_cast<Kernels>(name);
  // sm_90a code runs on compute capability 9.0 alone; everything newer takes sm_80's through PTX
  return compute_capability() == 90 ? kSm90 : kSm80;
}

void choose_kernels(const std::string& name) {
  const int chosen = name.empty() ? 0 : name == "sm80" ? kSm80 : name == "sm90" ? kSm90 : -1;
  if (chosen < 0) throw std::runtime_error("retro_kernels: the kernels are \"sm80\" or \"sm90\", got \"" + name + "\"");
  if (chosen == kSm90 && compute_capability() != 90 && compute_capability() != 0)
    throw std::runtime_error("retro_kernels: the kernels \"sm90\" run on compute capability 9.0 only, this GPU has " +
                             std::to_string(compute_capability() / 10) + "." + std::to_string(compute_capability() % 10));
  named.store(chosen, std::memory_order_relaxed);
}

}  // namespace retro_kernels
