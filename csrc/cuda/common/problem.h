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

struct Problem {
  Grouping grouping;
  ElementType type;       // of query, key, value, out and their gradients
  int dim;                // of queries, keys and values alike
  int batch, heads, kv_heads;
  int tokens;             // n
  int query_neighbours;   // kq
  int chunks, neighbours, retrieved;  // l, k, r
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
  uint16_t *grad_query, *grad_key, *grad_value;
  Strides grad_query_stride, grad_key_stride, grad_value_stride;
};

}  // namespace retro_kernels
