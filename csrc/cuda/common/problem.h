// What the bindings hand to a kernel, by value: pointers, sizes, strides. Plain C++, no CUDA. The words are those of ops/attention/common.py.
#pragma once
#include <stddef.h>
#include <stdint.h>

namespace retro_kernels {

enum Grouping : int { kClock = 0, kNeighbour = 1, kChunk = 2 };
enum ElementType : int { kFloat16 = 1, kBFloat16 = 2 };

using Stream = void*;  // cudaStream_t

constexpr int kMostSlots = 32768;  // of a group: their visibility is kept in shared memory

// Of a tensor [batch, chunk, neighbour, token, head, dim], in elements; the last stride is 1.
struct Strides {
  int64_t batch, chunk, neighbour, token, head;
};

// Division of numbers below 2^31 by one that is known at run time, as a multiplication: the high half of
// 2 i * multiplier, shifted (Granlund and Montgomery 1994, figure 4.1). As it begins, all quotients are 0.
struct Divisor {
  uint32_t multiplier = 0;
  int shift = 0;
};

inline Divisor divisor(int by) {
  if (by < 1) return {};
  Divisor d;
  while (int64_t{1} << d.shift < by) ++d.shift;
  d.multiplier = static_cast<uint32_t>(((uint64_t{1} << (31 + d.shift)) + by - 1) / by);
  return d;
}

struct Problem {
  Grouping grouping;
  ElementType type;       // of query, key, value, out and their gradients
  int dim;                // of queries, keys and values alike
  int batch, heads, kv_heads;
  int tokens;             // n
  int query_neighbours;   // kq
  int chunks, neighbours, retrieved;  // l, k, r
  Divisor by_tokens, by_retrieved;
  int stride;             // kClock: tokens that attend to one chunk
  int64_t first_token;    // kClock: token of clock 0; may be negative
  int first_group, groups;  // per sequence: [first_group, first_group + groups); see group.cuh
  float scale;

  const uint16_t *query, *key, *value;
  Strides query_stride, key_stride, value_stride;
  const uint8_t* mask;  // null: everything is visible
  Strides mask_stride;
  const int32_t* chunk_spans;  // [batch, chunks, 2], or null

  uint16_t* out;  // backward: read
  float* lse;
  Strides out_stride, lse_stride;

  // backward only
  const uint16_t* grad_out;
  Strides grad_out_stride;
  const float* grad_lse;  // of the natural log-sum-exp, laid out as lse; null: none
  uint16_t *grad_query, *grad_key, *grad_value;
  Strides grad_query_stride, grad_key_stride, grad_value_stride;
};

inline int64_t slots_of_group(const Problem& p) {
  return static_cast<int64_t>(p.grouping == kClock ? p.neighbours : 1) * p.retrieved;
}

}  // namespace retro_kernels
