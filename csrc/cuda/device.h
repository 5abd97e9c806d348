// The device that a call runs on, and which kernels it gets.
#pragma once
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
// "sm80" or "sm90", or "" for the newest. The emulator's default is "sm80".
void choose_kernels(const std::string& name);
// Whether they were chosen by name: what they do not take is then an error, and else the next older kernels' work.
bool kernels_named();

}  // namespace retro_kernels
