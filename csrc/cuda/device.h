// The device that a call runs on, and which kernels it gets.
#pragma once
#include <atomic>
#include <string>

#include "common/problem.h"

namespace retro_kernels {

enum Kernels : int { kSm80 = 80, kSm90 = 90 };

// Of the current device: 80 for compute capability 8.0. 0 in the emulator.
int compute_capability();
// Multiprocessors of the current device; 2 in the emulator.
int multiprocessors();
// The kernels of the current device: what `choose_kernels` said, else the newest written for it.
Kernels chosen_kernels();
// "sm80" or "sm90", or "" for the newest. The emulator's default is "sm80". What sm90's do not take is sm80's work, but
// an error with "sm90 only".
void choose_kernels(const std::string& name);
bool only_chosen_kernels();

// Makes the device and its context the calling thread's: PyTorch's autograd worker has none until it has launched
// something, and without one the driver makes no tensor map.
void make_current(int device);

// Launches since they were last asked for (bindings.cpp), so that a check can tell which kernels took a call.
enum KernelSet : int { kSetSm80, kSetSm90, kSetDecode, kKernelSets };
inline std::atomic<int64_t> launches_of[kKernelSets], launches_that_overlap;

inline void count_launch(KernelSet set, bool overlaps) {
  launches_of[set].fetch_add(1, std::memory_order_relaxed);
  if (overlaps) launches_that_overlap.fetch_add(1, std::memory_order_relaxed);
}

}  // namespace retro_kernels
