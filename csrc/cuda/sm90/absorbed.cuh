// Chunked cross-attention from the encoder's states, forward, for Hopper: W_k acts on the query and W_v on the weighted
// sum of states, so that no key or value exists (ops/absorbed/common.py).
//
// With m rows, S slots, width e and head size d a (chunk, head) takes 4 m e (d + S) FLOPs, 88 M at 64, 256, 896 and
// 128, and reads from the L2 cache S e states twice and 2 d e weights: compute-bound, the floor is the FLOPs over the
// matrix rate. How close the kernel comes is unmeasured: it has run in the emulator only.
//
// In 16 bits that is 1.38 MB a head: 0.92 of states, 0.46 of weights. Two heads share a block and its states, and the 2
// or 4 blocks of a cluster, which have further heads of the same rows, share them by multicast: each loads its part of
// every stage into all. So a head reads 0.57 MB in clusters of 4, 0.69 of 2, 0.92 alone.
//
// A block is persistent and takes items (chunk, 64 rows, two heads). A producer thread fills a ring with columns of 64:
// of the chunk's states, and of the weights of each head. Each of two consumer warpgroups has one head. It goes through
// the width twice. First, with columns of W_k, 64 columns of q W_k at once are made, rounded, and multiplied with the
// states' into all scores, which stay in registers, 64 x 256 at most. Then, with the softmax of them, 64 columns of the
// weighted sum of states, rounded, and multiplied with those of W_v into the output. Every (chunk, head) is computed by
// one warpgroup in one order.
#pragma once
#include "rows.cuh"

namespace retro_kernels {
namespace sm90 {

// Head sizes up to 64 or 128, up to 128 or 256 slots.
template <int kDim, int kStateRows>
struct AbsorbedShape {
  static constexpr int kQuery = kDim / 64 * kPanel;     // bytes: 64 rows of a head
  static constexpr int kStates = kStateRows * kPanelRow;  // 64 columns of all slots
  static constexpr int kWeights = kDim * kPanelRow;     // 64 columns of a head's weight
  static constexpr int kStage = kStates + 2 * kWeights;
  static constexpr int kMost = 232448 - 512 - 2 * kQuery;  // of what a block may have, for the ring
  static constexpr int kRing = kMost / kStage < 6 ? kMost / kStage : 6;
  static constexpr int kBarriers = 4 + 2 * kRing;
  static constexpr size_t kBytes = 2 * kQuery + kRing * kStage + 8 * kBarriers;
  static constexpr int kThreads = 3 * 128;

  static RK_DEVICE Shared query(int head) { return head * kQuery; }
  static RK_DEVICE Shared states(int i) { return 2 * kQuery + i * kStage; }
  static RK_DEVICE Shared weights(int i, int head) { return states(i) + kStates + head * kWeights; }
  static RK_DEVICE Shared barrier(int i) { return 2 * kQuery + kRing * kStage + 8 * i; }
  static RK_DEVICE Shared query_full(int head) { return barrier(head); }
  static RK_DEVICE Shared query_empty(int head) { return barrier(2 + head); }
  static RK_DEVICE Shared full(int i) { return barrier(4 + i); }
  static RK_DEVICE Shared empty(int i) { return barrier(4 + kRing + i); }
};

struct AbsorbedItem {
  int batch, chunk, token, head;  // the first of 64 rows, the first of two heads
  bool attends;                   // some items are of tokens that attend to nothing
};

RK_DEVICE AbsorbedItem absorbed_item(const Absorbed& f, int i) {
  const Problem& p = f.p;
  const int pairs = (p.heads + 1) / 2;
  AbsorbedItem item;
  item.head = 2 * (i % pairs);
  i /= pairs;
  const int row = i % f.row_tiles * kRows;
  i /= f.row_tiles;
  item.chunk = p.first_group + i % p.groups;
  item.batch = i / p.groups;
  item.token = static_cast<int>(p.first_token) + item.chunk * p.stride + row;
  item.attends = item.chunk >= 0 && item.chunk < p.chunks;
  return item;
}

template <class S>
RK_DEVICE void produce_absorbed(const Absorbed& f) {
  const Problem& p = f.p;
  const int rows = p.neighbours * p.retrieved / f.cluster;  // of a stage, this block's part
  const int first_row = block_index() % f.cluster * rows;
  int query_parity = 1;
  Place<S::kRing> ring;
  for (int i = block_index(); i < f.items; i += f.blocks) {
    const AbsorbedItem item = absorbed_item(f, i);
    for (int head = 0; head < 2; ++head) {
      wait(S::query_empty(head), query_parity);
      arrive_expecting(S::query_full(head), S::kQuery / kPanel * f.box_rows * kPanelRow);
      for (int panel = 0; panel < S::kQuery / kPanel; ++panel)  // a head beyond the last is zero
        load_box(f.query, S::query(head) + panel * kPanel, S::query_full(head), 64 * panel, item.head + head, item.token, 0,
                 item.batch);
    }
    query_parity ^= 1;
    if (!item.attends) continue;
    for (int pass = 0; pass < 2; ++pass) {
      for (int column = 0; column < f.width; column += 64) {
        // Empty when the consumers of all blocks have done with it: what follows writes to all of them. The bytes of
        // another block's boxes may come before this block says that it expects them.
        wait(S::empty(ring.at), ring.parity ^ 1);
        arrive_expecting(S::full(ring.at), p.neighbours * p.retrieved * kPanelRow + 2 * S::kWeights);
        int neighbour = first_row / p.retrieved, token = first_row % p.retrieved;
        for (int row = first_row; row < first_row + rows; row += f.state_box) {
          load_box_into(f.encoded, S::states(ring.at) + row * kPanelRow, S::full(ring.at), (1 << f.cluster) - 1, column,
                        0, token, neighbour, item.batch * p.chunks + item.chunk);
          token += f.state_box;
          if (token == p.retrieved) token = 0, ++neighbour;
        }
        for (int head = 0; head < 2; ++head) {
          const int there = item.head + head < p.heads ? item.head + head : item.head;
          load_box(pass == 0 ? f.w_key : f.w_value, S::weights(ring.at, head), S::full(ring.at), column,
                   there / (p.heads / p.kv_heads), 0, 0, 0);
        }
        ring.next();
      }
    }
  }
}

// This warp has done with a stage: says so to the producers of all blocks that fill it.
template <class S>
RK_DEVICE void give_stage(const Absorbed& f, int stage) {
  if (f.cluster == 1) {
    if (lane_index() == 0) arrive(S::empty(stage));
  } else if (lane_index() < f.cluster) {
    arrive_at(S::empty(stage), lane_index());
  }
}

// Which slots are visible, 32 to a word, the same in every thread.
// -> whether any is hidden
template <int kWords>
RK_DEVICE bool visible_states(const Problem& p, const AbsorbedItem& item, uint32_t (&visible)[kWords]) {
  bool hidden = false;
#pragma unroll
  for (int word = 0; word < kWords; ++word) {
    const int slot = 32 * word + lane_index(), neighbour = slot / p.retrieved, token = slot % p.retrieved;
    bool here = neighbour < p.neighbours;
    if (here && p.mask)
      here = p.mask[item.batch * p.mask_stride.batch + item.chunk * p.mask_stride.chunk +
                    neighbour * p.mask_stride.neighbour + token * p.mask_stride.token];
    visible[word] = ballot(here);
    if (p.mask) hidden = hidden || ballot(neighbour < p.neighbours && !here) != 0;
  }
  return hidden;
}

// 64 columns of a product as the left factors of four more.
template <class T>
RK_DEVICE void round_product(const float (&sum)[32], uint32_t (&rounded)[4][4]) {
#pragma unroll
  for (int j = 0; j < 8; ++j)
#pragma unroll
    for (int r = 0; r < 2; ++r) rounded[j / 2][j % 2 * 2 + r] = pack(T(), sum[4 * j + 2 * r], sum[4 * j + 2 * r + 1]);
}

template <class T, int kDim, int kStateRows>
RK_DEVICE void consume_absorbed(const Absorbed& f, int head) {
  using S = AbsorbedShape<kDim, kStateRows>;
  const Problem& p = f.p;
  const int thread = thread_index() % 128, lane = lane_index();
  const float scale = p.scale * kLog2E;
  int query_parity = 0;
  Place<S::kRing> ring;
  for (int i = block_index(); i < f.items; i += f.blocks) {
    const AbsorbedItem item = absorbed_item(f, i);
    const Shared query = S::query(head);
    float out[kDim / 2], largest[2], total[2];
    uint32_t weights[kStateRows / 16][4];
    uint32_t visible[kStateRows / 32];
    bool hidden = false;
#pragma unroll
    for (int r = 0; r < 2; ++r) largest[r] = minus_infinity(), total[r] = 0.0f;
    wait(S::query_full(head), query_parity);
    query_parity ^= 1;
    if (item.attends) {
      hidden = visible_states(p, item, visible);
      float score[kStateRows / 2];
#pragma unroll
      for (int j = 0; j < kStateRows / 2; ++j) score[j] = 0.0f;
      for (int column = 0; column < f.width; column += 64) {
        float turned[32];
        uint32_t left[4][4];
        wait(S::full(ring.at), ring.parity);
        fence_products();
#pragma unroll
        for (int k = 0; k < kDim / 16; ++k)
          multiply_columns(T(), turned, rows_descriptor(query + k / 4 * kPanel + k % 4 * 32),
                           columns_descriptor(S::weights(ring.at, head) + k * 2 * kBlock, 0), k > 0);
        wait_for_products(turned);
        if (column + 64 > f.width)  // beyond the width inf times 0 would be NaN
#pragma unroll
          for (int j = 0; j < 32; ++j)
            if (column + j / 4 * 8 >= f.width) turned[j] = 0.0f;
        round_product<T>(turned, left);
        fence_products();
#pragma unroll
        for (int k = 0; k < 4; ++k) add_rows(T(), score, left[k], rows_descriptor(S::states(ring.at) + k * 32));
        wait_for_products(score);
        give_stage<S>(f, ring.at);
        ring.next();
      }
#pragma unroll
      for (int r = 0; r < 2; ++r) {
#pragma unroll
        for (int j = 0; j < kStateRows / 8; ++j) {
#pragma unroll
          for (int c = 0; c < 2; ++c) {
            float& s = score[4 * j + 2 * r + c];
            s = visible[j / 4] >> (j % 4 * 8 + 2 * (lane % 4) + c) & 1 ? multiply_rounded(s, scale) : minus_infinity();
            largest[r] = larger(largest[r], s);
          }
        }
        largest[r] = larger(largest[r], shuffle_xor(largest[r], 1));
        largest[r] = larger(largest[r], shuffle_xor(largest[r], 2));
        const float base = base_of(largest[r]);
#pragma unroll
        for (int j = 0; j < kStateRows / 8; ++j) {
          const float first = exp2_fast(score[4 * j + 2 * r] - base);
          const float second = exp2_fast(score[4 * j + 2 * r + 1] - base);
          total[r] += first + second;
          weights[j / 2][j % 2 * 2 + r] = pack(T(), first, second);
        }
      }
    }
#pragma unroll
    for (int j = 0; j < kDim / 2; ++j) out[j] = 0.0f;
    if (item.attends) {
      for (int column = 0; column < f.width; column += 64) {
        float mixed[32];
        uint32_t left[4][4];
        wait(S::full(ring.at), ring.parity);
        if (hidden) {  // a masked state may be NaN, and 0 times NaN is NaN: its row becomes 0
#pragma unroll
          for (int word = 0; word < kStateRows / 32; ++word)
            for (int part = thread; part < 32 * 8; part += 128)
              if (!(visible[word] >> (part / 8) & 1))
                *shared_pointer<Vector16>(S::states(ring.at) + word * 32 * kPanelRow + part * 16) = Vector16{};
          fence_async();
          named_barrier(1 + head, 128);
        }
#pragma unroll
        for (int j = 0; j < 32; ++j) mixed[j] = 0.0f;
        fence_products();
#pragma unroll
        for (int k = 0; k < kStateRows / 16; ++k)
          add_columns(T(), mixed, weights[k], columns_descriptor(S::states(ring.at) + k * 2 * kBlock, 0));
        wait_for_products(mixed);
        round_product<T>(mixed, left);
        fence_products();
#pragma unroll
        for (int k = 0; k < 4; ++k) add_rows(T(), out, left[k], rows_descriptor(S::weights(ring.at, head) + k * 32));
        wait_for_products(out);
        give_stage<S>(f, ring.at);
        ring.next();
      }
    }

    const bool there = item.head + head < p.heads;
    finish_rows<T, kDim>(p, query, 1 + head, item.token, there ? f.box_rows : 0,
                         item.batch * p.lse_stride.batch + (item.head + head) * p.lse_stride.head, out, largest, total);
    if (thread == 0) {
      for (int panel = 0; panel < kDim / 64; ++panel)  // a head beyond the last is not written
        store_box(f.out, query + panel * kPanel, 64 * panel, item.head + head, item.token, 0, item.batch);
      wait_for_stores();
      arrive(S::query_empty(head));
    }
  }
}

template <class T, int kDim, int kStateRows>
RK_KERNEL((AbsorbedShape<kDim, kStateRows>::kThreads), 1) absorbed_kernel(RK_PARAMETER Absorbed f) {
  using S = AbsorbedShape<kDim, kStateRows>;
  const int warpgroup = thread_index() / 128;
  if (thread_index() == 0) {
    for (int head = 0; head < 2; ++head) init_barrier(S::query_full(head), 1), init_barrier(S::query_empty(head), 1);
    for (int i = 0; i < S::kRing; ++i) init_barrier(S::full(i), 1), init_barrier(S::empty(i), 8 * f.cluster);  // warps
    fence_barriers();
  }
  // Rows of states that no slot has are never written again: zero, so that weights of zero leave nothing of them.
  const int used = f.p.neighbours * f.p.retrieved * 8;
  for (int i = used + thread_index(); i < kStateRows * 8; i += S::kThreads)
    for (int stage = 0; stage < S::kRing; ++stage) *shared_pointer<Vector16>(S::states(stage) + i * 16) = Vector16{};
  fence_async();
  if (f.cluster == 1)
    block_barrier();
  else
    cluster_barrier();  // no block reaches another's barriers before they are made
  if (warpgroup == 2) {
    give_registers<40>();
    if (thread_index() == 256) produce_absorbed<S>(f);
  } else {
    take_registers<232>();
    consume_absorbed<T, kDim, kStateRows>(f, warpgroup);
  }
  if (f.cluster > 1) cluster_barrier();  // no block ends while another may still reach it
}

}  // namespace sm90
}  // namespace retro_kernels
