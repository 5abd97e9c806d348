// What the bindings hand to the decode kernels: pointers, sizes, strides in elements. Plain data, passed by value.
#pragma once
#include <stdint.h>

namespace retro_kernels {
namespace decode {

constexpr int kMostColumns = 4096;  // of a query, a cache or a weight
constexpr int kMostSlots = 64;      // of a block's tile
constexpr int kMostAdded = 256;     // rows of a head's weight that are added up

// Of queries and outputs the first three.
enum Type : int { kFloat32 = 0, kFloat16 = 1, kBFloat16 = 2, kInt8 = 3, kFloat8 = 4 };

// ops/decoding/common.py says what each tensor means; null: not given. A size of `dim` or `dim_value` is a multiple
// of 8.
struct Attend {
  int tokens, heads, kv_heads, neighbours, retrieved, dim, dim_value, chunk_size, batch;
  int tile, splits;  // slots of a block, and blocks that share the slots of a sequence
  Type query_type, key_type, value_type, out_type, null_value_type;
  bool bias_per_slot;
  float scale;
  const void *query, *key, *value, *null_value;
  int64_t query_stride[3];  // batch, token, head
  int64_t key_stride[4], value_stride[4];  // batch, neighbour, retrieved token, head
  const uint8_t *mask, *valid;
  int64_t mask_stride[3], key_scale_stride[3], value_scale_stride[3];  // batch, neighbour, retrieved token
  int64_t null_value_stride;
  const float *logit_bias, *null_logit, *key_scale, *value_scale;
  const int64_t *position, *chunk;
  float *sums, *statistics;  // [splits, b, t, h, dim_value]; [2, splits, b, t, h]: maximum and total
  void* out;
  float* lse;
};

// out [n, h, e | d_value] = x [n, h, d | e] times weight [kv_heads, d | d_value, e], or its transpose.
struct Project {
  int count, heads, kv_heads, rows, columns;  // rows and columns of a head's weight; columns are a multiple of 8
  bool transposed;                            // x times weight^T: a product with every row
  Type type;
  const void *x, *weight;
  int64_t x_stride[2];       // n, head
  int64_t weight_stride[2];  // head, row
  void* out;                 // contiguous
};

}  // namespace decode
}  // namespace retro_kernels
