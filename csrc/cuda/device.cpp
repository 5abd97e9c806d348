#include "device.h"

#include <atomic>
#include <stdexcept>

#if defined(RK_EMULATED)
#include "emulator/driver.h"
#else
#include <cuda_runtime_api.h>
#endif

namespace retro_kernels {
namespace {

std::atomic<int> named{0};
std::atomic<bool> only{false};

#if !defined(RK_EMULATED)
void check(cudaError_t status, const char* what) {
  if (status != cudaSuccess)
    throw std::runtime_error(std::string("retro_kernels: ") + what + " failed: " + cudaGetErrorString(status));
}

int attribute(cudaDeviceAttr which, int device) {
  int value = 0;
  check(cudaDeviceGetAttribute(&value, which, device), "cudaDeviceGetAttribute");
  return value;
}

// `find(device)` of the current device, asked for once each.
template <class Find>
int remembered(std::atomic<int> (&known)[64], Find find) {
  int device = 0;
  check(cudaGetDevice(&device), "cudaGetDevice");
  if (device >= 64) return find(device);
  int value = known[device].load(std::memory_order_relaxed);
  if (value == 0) known[device].store(value = find(device), std::memory_order_relaxed);
  return value;
}
#endif

}  // namespace

int compute_capability() {
#if defined(RK_EMULATED)
  return 0;
#else
  static std::atomic<int> known[64];
  return remembered(known, [](int device) {
    return 10 * attribute(cudaDevAttrComputeCapabilityMajor, device) + attribute(cudaDevAttrComputeCapabilityMinor, device);
  });
#endif
}

int multiprocessors() {
#if defined(RK_EMULATED)
  return 2;
#else
  static std::atomic<int> known[64];
  return remembered(known, [](int device) { return attribute(cudaDevAttrMultiProcessorCount, device); });
#endif
}

void make_current(int device) {
#if defined(RK_EMULATED)
  static_cast<void>(device);
  emulator::has_context() = true;
#else
  check(cudaSetDevice(device), "cudaSetDevice");  // from CUDA 12 on it binds the context, even of the device that is current
#endif
}

Kernels chosen_kernels() {
  const int name = named.load(std::memory_order_relaxed);
  if (name) return static_cast<Kernels>(name);
  // sm_90a code runs on compute capability 9.0 alone; everything newer takes sm_80's through PTX
  return compute_capability() == 90 ? kSm90 : kSm80;
}

bool only_chosen_kernels() { return only.load(std::memory_order_relaxed); }

void choose_kernels(const std::string& name) {
  const int chosen = name.empty() ? 0 : name == "sm80" ? kSm80 : name == "sm90" || name == "sm90 only" ? kSm90 : -1;
  if (chosen < 0)
    throw std::runtime_error("retro_kernels: the kernels are \"sm80\", \"sm90\" or \"sm90 only\", got \"" + name + "\"");
  if (chosen == kSm90 && compute_capability() != 90 && compute_capability() != 0)
    throw std::runtime_error("retro_kernels: the kernels \"sm90\" run on compute capability 9.0 only, this GPU has " +
                             std::to_string(compute_capability() / 10) + "." + std::to_string(compute_capability() % 10));
  named.store(chosen, std::memory_order_relaxed);
  only.store(name == "sm90 only", std::memory_order_relaxed);
}

}  // namespace retro_kernels
