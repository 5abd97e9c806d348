// The kernels of sm_80 as the bindings call them.
#pragma once
#include "../common/problem.h"

namespace retro_kernels {

namespace sm80 {

// Shared memory of a block: what sm_86, sm_89 and sm_120 have, of which the visibility of many slots takes a part.
constexpr size_t kMostShared = 99 << 10;

// Pointers and strides must be multiples of 16 bytes, `dim` 64, 96 or 128.
void forward(const Problem& p, Stream stream);
void backward(const Problem& p, Stream stream);

}  // namespace sm80
}  // namespace retro_kernels
