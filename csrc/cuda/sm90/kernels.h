// The kernels of sm_90a as the bindings call them.
#pragma once
#include "../common/problem.h"

namespace retro_kernels {
namespace sm90 {

// Pointers and strides must be multiples of 16 bytes, `dim` a multiple of 8 up to 128. What is not taken is not begun, and
// the reason is returned; else null.
const char* forward(const Problem& p, Stream stream);

}  // namespace sm90
}  // namespace retro_kernels
