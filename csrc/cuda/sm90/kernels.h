// The kernels of sm_90a as the bindings call them.
#pragma once
#include "../common/problem.h"

namespace retro_kernels {
namespace sm90 {

// Pointers and strides must be multiples of 16 bytes, `dim` a multiple of 8 up to 128. What is not taken is not begun,
// and the reason is returned; else null.
const char* forward(const Problem& p, Stream stream);
const char* backward(const Problem& p, Stream stream);

// What the absorbed strategy has in place of keys and values (ops/absorbed/common.py), of p's type.
struct States {
  int width;  // e, a multiple of 8
  const void *encoded, *w_key, *w_value;
  Strides encoded_stride;                       // no head
  int64_t w_key_stride[2], w_value_stride[2];   // kv head, row
};

// The same for the absorbed strategy: grouping kClock, `p` without keys and values; neighbours of a multiple of 8
// tokens, and at most kMostStates of them in a chunk.
constexpr int kMostStates = 256;
const char* absorbed_forward(const Problem& p, const States& states, Stream stream);

}  // namespace sm90
}  // namespace retro_kernels
