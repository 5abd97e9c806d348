// New tokens against the cache of the chunk that each sequence attends to: partial sums of tiles of slots, and their
// combination.
//
// Floor: the bytes of the cache over the memory's bandwidth; every number of it is multiplied once or twice for each
// row (a token and a query head) that shares it, 1 FLOP a byte with one row and bf16. At 3.35 TB/s, 256 slots and 32
// heads of 128 in bf16: 4.2 MB and 1.3 us a sequence. From encoder states, key and value both, which all heads share,
// it is 0.46 MB for 29 MFLOP of fp32 a sequence: from about 8 sequences on the multiply-adds, not the memory, bound the
// time.
//
// A block has one tile of up to 64 slots of one (sequence, key/value head) and up to 8 of its rows. All loads of a
// thread's part of the keys are issued before the first is used, and the values are asked into the L2 cache before the
// softmax waits for the keys. With few sequences and heads tiles are smaller, so that one sequence fills a GPU; how a
// call is cut depends on its shapes alone. `combine` adds the tiles' sums in order: no atomics, bitwise reproducible.
//
// Positions and validity are tensors, so a captured graph serves them all. Everything is fp32 between the loads and the
// result. The kernels may start before their predecessor in the stream has ended (programmatic dependent launch): what
// others wrote is touched only after wait_for_predecessor().
#pragma once
#include "tiles.cuh"

namespace retro_kernels {
namespace decode {


enum State { kIdle, kAttends, kBeyond };

RK_DEVICE int64_t floor_divide(int64_t x, int64_t by) { return x >= 0 ? x / by : -((-x + by - 1) / by); }

// ops/decoding/common.py: `states`
RK_DEVICE State state_of(const Attend& p, int batch, int token) {
  if (p.valid && !p.valid[batch]) return kIdle;
  const int64_t start = p.position[batch], place = start + token;
  if (place < 0) return kBeyond;
  const int64_t since = place - (p.chunk_size - 1);
  if (since < 0) return kIdle;
  const int64_t first = start - (p.chunk_size - 1);
  const int64_t held = p.chunk ? p.chunk[batch] : (first > 0 ? first : 0) / p.chunk_size;
  return floor_divide(since, p.chunk_size) == held ? kAttends : kBeyond;
}

template <int kRows>
struct AttendShared {
  int64_t key_at[kMostSlots], value_at[kMostSlots];  // offsets; -1: not read
  float key_factor[kMostSlots], value_factor[kMostSlots];
  int place[kMostSlots];  // of the slot in a row of logit_bias
  float products[kRows][kMostSlots];
  int64_t query_at[kRows];
  int64_t row[kRows];  // (batch, token, head) as one number; -1: does not attend
  Four buffer[2 * kThreads];
  // then the rows of the query: [kRows][2][dim / 8] Four
};

// Scores to weights, their maximum and total to `statistics`. A warp has a row, a lane two slots.
template <int kRows>
RK_DEVICE void soften(const Attend& p, AttendShared<kRows>& f, int split, int slots, int64_t rows) {
  const int warp = thread_index() / 32, lane = thread_index() % 32;
  for (int r = warp; r < kRows; r += kThreads / 32) {
    if (f.row[r] < 0) continue;  // the same for all lanes
    float score[2], largest = minus_infinity();
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int slot = lane + 32 * i;
      score[i] = minus_infinity();
      if (slot < slots && f.key_at[slot] >= 0) {
        score[i] = f.products[r][slot] * f.key_factor[slot];
        if (p.logit_bias) {
          const int64_t wide = p.bias_per_slot ? p.neighbours * p.retrieved : p.retrieved;
          score[i] += kLog2E * p.logit_bias[f.row[r] * wide + f.place[slot]];
        }
      }
      largest = larger(largest, score[i]);
    }
    for (int distance = 16; distance > 0; distance /= 2) largest = larger(largest, shuffle_xor(largest, distance));
    const float base = base_of(largest);
    float total = 0.0f;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int slot = lane + 32 * i;
      const float weight = exp2_bounded(score[i] - base);
      total += weight;
      if (slot < slots) f.products[r][slot] = weight * f.value_factor[slot];
    }
    for (int distance = 16; distance > 0; distance /= 2) total += shuffle_xor(total, distance);
    if (lane == 0) {
      p.statistics[split * rows + f.row[r]] = largest;
      p.statistics[(p.splits + split) * rows + f.row[r]] = total;
    }
  }
}

// Blocks: (sequence, split, key/value head, row tile), the last fastest: blocks that read the same slots are side by
// side, and so are those whose slots are.
template <int kRows>
RK_KERNEL(kThreads, 3) attend_kernel(RK_PARAMETER Attend p) {
  let_successor_start();
  auto& f = *shared_pointer<AttendShared<kRows>>(0);
  Four* query_rows = reinterpret_cast<Four*>(&f + 1);
  const int group = p.heads / p.kv_heads, row_tiles = (p.tokens * group + kRows - 1) / kRows;
  int item = block_index();
  const int row_tile = item % row_tiles;
  item /= row_tiles;
  const int kv_head = item % p.kv_heads;
  item /= p.kv_heads;
  const int split = item % p.splits, batch = item / p.splits, first_slot = split * p.tile;
  const int all_slots = p.neighbours * p.retrieved;
  const int slots = all_slots - first_slot < p.tile ? all_slots - first_slot : p.tile;
  const int64_t rows = static_cast<int64_t>(p.batch) * p.tokens * p.heads;
  wait_for_predecessor();

  if (thread_index() < kRows) {
    const int i = row_tile * kRows + thread_index(), token = i / group, head = kv_head * group + i % group;
    const bool attends = token < p.tokens && state_of(p, batch, token) == kAttends;
    f.row[thread_index()] = attends ? (static_cast<int64_t>(batch) * p.tokens + token) * p.heads + head : -1;
    f.query_at[thread_index()] =
        attends ? batch * p.query_stride[0] + token * p.query_stride[1] + head * p.query_stride[2] : -1;
  }
  block_barrier();
  bool any = false;
#pragma unroll
  for (int r = 0; r < kRows; ++r) any = any || f.row[r] >= 0;
  if (!any) return;  // nothing of the cache is read

  for (int i = thread_index(); i < slots; i += kThreads) {
    const int slot = first_slot + i;
    const int64_t neighbour = slot / p.retrieved, token = slot % p.retrieved;
    const bool visible =
        !p.mask || p.mask[batch * p.mask_stride[0] + neighbour * p.mask_stride[1] + token * p.mask_stride[2]];
    f.key_at[i] = f.value_at[i] = -1;
    f.key_factor[i] = p.scale * kLog2E;
    f.value_factor[i] = 1.0f;
    f.place[i] = p.bias_per_slot ? slot : static_cast<int>(token);
    if (visible) {
      f.key_at[i] = batch * p.key_stride[0] + neighbour * p.key_stride[1] + token * p.key_stride[2] +
                    kv_head * p.key_stride[3];
      f.value_at[i] = batch * p.value_stride[0] + neighbour * p.value_stride[1] + token * p.value_stride[2] +
                      kv_head * p.value_stride[3];
      const auto at = [&](const int64_t* stride) {
        return batch * stride[0] + neighbour * stride[1] + token * stride[2];
      };
      if (p.key_scale) f.key_factor[i] *= p.key_scale[at(p.key_scale_stride)];
      if (p.value_scale) f.value_factor[i] = p.value_scale[at(p.value_scale_stride)];
    }
  }
  fill_rows<kRows>(p.query_type, p.query, p.dim / 8, [&](int r) { return f.query_at[r]; }, query_rows);
  block_barrier();

  const int bytes = p.value_type == kFloat32 ? 4 : p.value_type <= kBFloat16 ? 2 : 1;
  const int lines = (p.dim_value * bytes + 127) / 128;
  if (p.value != p.key)
    for (int i = thread_index(); i < slots * lines; i += kThreads)
      if (f.value_at[i / lines] >= 0)
        prefetch(static_cast<const char*>(p.value) + f.value_at[i / lines] * bytes + 128 * (i % lines));

  float* products = &f.products[0][0];
#define RK_DOT(kType) dot_slots<kType, kRows>(p.key, f.key_at, slots, p.dim / 8, query_rows, products, kMostSlots)
  RK_BY_CACHE_TYPE(p.key_type, RK_DOT)
#undef RK_DOT
  block_barrier();
  soften<kRows>(p, f, split, slots, rows);
  block_barrier();
  const auto write = [&](int r, int column, float sum) {
    if (f.row[r] >= 0) p.sums[(split * rows + f.row[r]) * p.dim_value + column] = sum;
  };
#define RK_SUM(kType) \
  sum_slots<kType, kRows>(p.value, f.value_at, slots, 0, p.dim_value / 8, products, kMostSlots, f.buffer, write)
  RK_BY_CACHE_TYPE(p.value_type, RK_SUM)
#undef RK_SUM
}

// A thread has four columns of a row: the tiles' sums in order, then the null slot. It writes every row, those that do
// not attend, of which there are no sums, with 0 or NaN.
RK_KERNEL(kThreads, 3) combine_kernel(RK_PARAMETER Attend p) {
  let_successor_start();
  wait_for_predecessor();
  const int quarters = p.dim_value / 4;
  const int64_t rows = static_cast<int64_t>(p.batch) * p.tokens * p.heads;
  const int64_t item = static_cast<int64_t>(block_index()) * kThreads + thread_index();
  if (item >= rows * quarters) return;
  const int64_t row = item / quarters;
  const int column = 4 * static_cast<int>(item % quarters), head = static_cast<int>(row % p.heads);
  const State state = state_of(p, static_cast<int>(row / p.heads / p.tokens), static_cast<int>(row / p.heads % p.tokens));
  float sum[4] = {}, total = 0.0f, largest = minus_infinity();
  if (state == kAttends) {
    for (int s = 0; s < p.splits; ++s) largest = larger(largest, p.statistics[s * rows + row]);
    const float null_logit = p.null_logit ? kLog2E * p.null_logit[row] : minus_infinity();
    largest = larger(largest, null_logit);
    const float base = base_of(largest);
#pragma unroll 4
    for (int s = 0; s < p.splits; ++s) {
      const float weight = exp2_bounded(p.statistics[s * rows + row] - base);
      const Four part = *reinterpret_cast<const Four*>(p.sums + (s * rows + row) * p.dim_value + column);
      total += weight * p.statistics[(p.splits + s) * rows + row];
      sum[0] += weight * part.x;
      sum[1] += weight * part.y;
      sum[2] += weight * part.z;
      sum[3] += weight * part.w;
    }
    if (p.null_logit) {
      const float weight = exp2_bounded(null_logit - base);
      total += weight;
      if (p.null_value)
#pragma unroll
        for (int i = 0; i < 4; ++i)
          sum[i] += weight * load_number(p.null_value_type, p.null_value, head * p.null_value_stride + column + i);
    }
  }
  const float other = state == kIdle ? 0.0f : not_a_number();
  const float inverse = total == 0.0f ? 0.0f : 1.0f / total;
#pragma unroll
  for (int i = 0; i < 4; ++i)
    store_number(p.out_type, p.out, row * p.dim_value + column + i, state == kAttends ? sum[i] * inverse : other);
  if (column == 0) {
    const float natural = log_of_sum(largest, total, log2_fast(total));
    p.lse[row] = state == kAttends ? natural : state == kIdle ? minus_infinity() : not_a_number();
  }
}

}  // namespace decode
}  // namespace retro_kernels
