// What the bindings hand to the kernels: plain pointers, sizes and strides. Included by translation units compiled
// for different instruction sets, so it must define no function and include no C++ standard header.
#pragma once
#include <stddef.h>
#include <stdint.h>

namespace retro_kernels {

enum Type : int { kFloat32 = 0, kFloat16 = 1, kBFloat16 = 2 };

// Which query rows and key slots see each other; the numbers and the words of ops/attention/common.py.
enum Grouping : int { kClock = 0, kNeighbour = 1, kChunk = 2 };

// An optional small operand (bias, rotary table, null slot): its own type, strides in elements, last stride 1.
struct Operand {
  const void* data = nullptr;
  Type type = kFloat32;
  int64_t stride0 = 0, stride1 = 0;
};

struct Problem {
  Grouping grouping;
  bool causal;
  int64_t batch, query_chunks, query_neighbours, tokens, heads;  // query's axes: b, lq, kq, n, h
  int64_t chunks, neighbours, retrieved, kv_heads;               // key's axes: l, k, r, hk
  int64_t dim, dim_value;
  int64_t groups;       // per sequence
  int64_t table_rows;   // rows of the bias, of the query's rotary tables (M)
  int64_t stride;       // CLOCK: tokens that attend to one chunk
  int64_t first_token;  // CLOCK: token of clock 0; may be negative
  float scale;
  float softcap;  // logits are softcap * tanh(logits / softcap) before the bias; 0: they are not capped
  Type type;  // of query, key, value, out and their gradients

  const void *query, *key, *value;
  int64_t query_stride[5];  // batch, chunk, neighbour, token, head
  int64_t key_stride[5];    // batch, chunk, neighbour, retrieved token, head
  int64_t value_stride[5];

  const uint8_t* mask;  // null: everything is visible
  int64_t mask_stride[4];

  const int32_t* chunk_spans;    // [batch, chunks, 2] or null
  const int32_t* first_visible;  // [batch, tokens] or null

  Operand bias;              // strides: head, row
  int64_t bias_slots;        // r or k * r
  Operand query_cos, query_sin, key_cos, key_sin;  // stride0: row
  int64_t rotary_width;      // columns of a table; 0: no rotation
  bool rotary_interleaved;
  Operand null_key, null_value;  // stride0: head

  Operand relative_key;                // strides: head, row; none: no relative positions
  Operand content_bias, relative_bias;  // stride0: head
  int64_t distances;                    // rows of relative_key: M + r - 1
  // The table as the products read it, packed once per call: `heads` of relative_rows x relative_width elements.
  float* relative_packed;
  int64_t relative_rows, relative_width;  // a multiple of 8, 8 to 15 more than distances; see pack_table

  bool dropout;
  uint64_t seed;
  uint32_t threshold;  // of 65536 lots, those below are dropped
  float survivor;      // what is kept is multiplied by this

  // forward: written; backward: read. Contiguous.
  void* out;
  float *lse, *log_sum;  // with a bias two planes in base 2: the maximum and the logarithm of the sum

  // backward only
  const void* grad_out;
  int64_t grad_out_stride[5];
  const float* grad_lse;  // of the natural log-sum-exp, contiguous as one plane of lse; null: none
  void *grad_query, *grad_key, *grad_value;  // contiguous
  // fp32 partial sums, `copies` of each, contiguous; null when not wanted
  float *bias_partial, *null_key_partial, *null_value_partial;
  float *relative_partial;  // [copies, h, distances, dim padded to 16]
  float *content_bias_partial, *relative_bias_partial;
  int64_t copies;
  bool stream_gradients;  // dK and dV are larger than the cache: write past it
};

struct DecodeProblem;
struct ProjectProblem;

// One instruction-set level's decode kernels; see decode_problem.h.
struct DecodeLevel {
  void (*plan)(DecodeProblem&);  // chooses how the work is cut
  int64_t (*items)(const DecodeProblem&);
  size_t (*scratch_bytes)(const DecodeProblem&);
  void (*attend)(const DecodeProblem&, int64_t first_item, int64_t last_item, char* scratch);
  // The (batch, token, head) rows [first, last) from their partial sums.
  void (*combine)(const DecodeProblem&, int64_t first, int64_t last, char* scratch);
  // Work item: (key/value head, range of out's columns), the range running fastest.
  size_t (*project_scratch)(const ProjectProblem&);
  void (*project)(const ProjectProblem&, int64_t first_item, int64_t last_item, char* scratch);
};

// The absorbed strategy: a clock's problem without keys and values, and what they would be made of.
struct Absorbed {
  Problem p;
  int64_t width;  // e
  const void *encoded, *w_key, *w_value;
  int64_t encoded_stride[4];                // batch, chunk, neighbour, retrieved token
  int64_t w_key_stride[2], w_value_stride[2];  // kv head, row
  Operand bias_key, bias_value;             // stride0: kv head

  // backward; what is not wanted is null
  void* grad_encoded;                       // contiguous, zero where it is not written
  // fp32 sums, transposed: [kv head, e and the biases padded to 16, dim | dim_value padded to 16]
  float *w_key_total, *w_value_total;
  float* grad_states;                       // fp32 [ranges, e and the biases padded to 16, ld_states]
  float* query_total;                       // fp32 [h, stride, dim padded to 16] of one chunk, where one call is not all
  int64_t ranges, ld_states, blocks;        // ranges of kv heads; key blocks a call takes, at most 4
};

// e, and two columns for the projections' biases where there are any: the second holds what rounding leaves of the first.
inline int64_t absorbed_columns(const Absorbed& a) { return a.width + (a.bias_key.data || a.bias_value.data ? 2 : 0); }

inline int64_t absorbed_key_block(int64_t width) { return width <= 4096 ? 256 : 128; }

// One instruction-set level. `scratch` is 64-byte aligned and holds scratch_bytes(problem, backward) bytes.
struct Level {
  const char* name;
  size_t (*scratch_bytes)(const Problem&, bool backward);
  // Fills relative_packed for one head.
  void (*pack_relative)(const Problem&, int64_t head);
  // Work item: (batch, group, kv head), the kv head running fastest.
  void (*forward)(const Problem&, int64_t first_item, int64_t last_item, char* scratch);
  // `following`: the item this thread computes next, or -1. `copy`: the partial copy of the parameter gradients to add to.
  void (*backward)(const Problem&, int64_t item, int64_t following, int64_t copy, char* scratch);
  DecodeLevel decode;
  size_t (*absorbed_scratch_bytes)(const Absorbed&);
  void (*absorbed_forward)(const Absorbed&, int64_t first_item, int64_t last_item, char* scratch);
  size_t (*absorbed_backward_scratch_bytes)(const Absorbed&);
  // The kv heads [first_head, last_head), which are range `range`, of a (batch, chunk) against its slots [begin, end).
  void (*absorbed_backward)(const Absorbed&, int64_t place, int64_t begin, int64_t end, int64_t range,
                            int64_t first_head, int64_t last_head, char* scratch);
  // Their states' gradients: 16 columns of the ranges' sums, from `column` on.
  void (*absorbed_states)(const Absorbed&, int64_t place, int64_t begin, int64_t end, int64_t column);
};

}  // namespace retro_kernels
