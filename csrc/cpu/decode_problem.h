// What the bindings hand to the decode kernels; the same rules as in problem.h.
#pragma once
#include "problem.h"

namespace retro_kernels {

enum CacheType : int { kCacheFloat32 = 0, kCacheFloat16 = 1, kCacheBFloat16 = 2, kCacheInt8 = 3, kCacheFloat8 = 4 };

struct DecodeProblem {
  int64_t batch, tokens, heads, dim;
  int64_t neighbours, retrieved, kv_heads, dim_value;
  int64_t slots;  // neighbours * retrieved
  float scale, softcap;  // softcap: as in problem.h
  Type type;  // of query and out
  CacheType key_type, value_type;
  bool shared;  // value is key, element for element

  const void *query, *key, *value;
  int64_t query_stride[3];  // batch, token, head
  int64_t key_stride[4];    // batch, neighbour, retrieved token, head
  int64_t value_stride[4];

  const uint8_t* mask;  // null: everything is visible
  int64_t mask_stride[3];
  const float* logit_bias;  // [batch, tokens, heads, bias_slots] or null
  int64_t bias_slots;       // r or k * r
  const float* null_logit;  // [batch, tokens, heads] or null
  Operand null_value;       // stride0: head; may be absent beside null_logit
  Operand key_cos, key_sin;
  int64_t rotary_width;
  bool rotary_interleaved;
  const float *key_scale, *value_scale;
  int64_t key_scale_stride[3], value_scale_stride[3];

  const uint8_t* attends;  // [batch, tokens]: the others are not these kernels' to compute

  // How the work is cut, by shapes alone.
  bool packed;             // many rows share a key/value head, or keys are turned: a tile is first widened to fp32
  int64_t head_block;      // key/value heads of an item
  int64_t row_block;       // (token, query head) rows of an item
  int64_t tile;            // slots of a tile
  int64_t splits, split_slots;

  void* out;       // [batch, tokens, heads, dim_value]
  float* lse;      // [batch, tokens, heads]
  float* partial;  // splits > 1: sums [splits, batch, tokens, heads, dim_value + 2], the last two maximum and total
};

// out = x W or x W', one matrix for each key/value head, whose rows are those of all tokens and of the query heads that
// share it. The time is that of reading W once.
struct ProjectProblem {
  bool transposed;
  int64_t tokens, heads, kv_heads;
  int64_t depth, width;  // of x and of out; W is [depth, width], or, transposed, [width, depth]
  Type type;             // of all three
  const void *x, *weight;
  int64_t x_stride[2];       // token, head
  int64_t weight_stride[2];  // head, row
  void* out;                 // [tokens, heads, width]
  int64_t parts, part;       // ranges of out's columns, and the columns of one
};

}  // namespace retro_kernels
