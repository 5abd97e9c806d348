#pragma once
#include <string>

#include "problem.h"

namespace retro_kernels {

// The level in use: the highest that was built and that this CPU runs, or the one RETRO_KERNELS_CPU_ISA names.
// Throws std::runtime_error when that variable names a level that is unknown, not built or beyond this CPU.
const Level& level();
// Chooses by name ("" for the highest); the same errors.
void choose_level(const std::string& name);
// Names of the levels that were built and that this CPU runs, lowest first, separated by spaces.
std::string usable_levels();

}  // namespace retro_kernels
