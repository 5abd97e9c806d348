// A tensor map of the copy engine, as the emulator keeps it. Elements are of two bytes; axis 0 is the innermost.
#pragma once
#include <cstdint>

namespace retro_kernels {
namespace emulator {

struct alignas(64) TensorMap {
  char* data;
  int64_t size[5], stride[5];  // strides in bytes
  int box[5];
};

}  // namespace emulator
}  // namespace retro_kernels
