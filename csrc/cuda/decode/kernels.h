// The decode kernels as the bindings call them. All launches may overlap their predecessor in the stream where the code
// that was loaded waits for it: that compiled for 9.0 and newer.
#pragma once
#include "../common/problem.h"
#include "problem.h"

namespace retro_kernels {
namespace decode {

void attend(const Attend& p, Stream stream);  // both launches
void project(const Project& p, Stream stream);

}  // namespace decode
}  // namespace retro_kernels
