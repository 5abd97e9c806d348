// The decode kernels as the bindings call them. All launches may overlap their predecessor in the stream where the
// device can do that (compute capability 9.0 on).
#pragma once
#include "../common/problem.h"
#include "problem.h"

namespace retro_kernels {
namespace decode {

void attend(const Attend& p, Stream stream);  // both launches
void project(const Project& p, Stream stream);

}  // namespace decode
}  // namespace retro_kernels
