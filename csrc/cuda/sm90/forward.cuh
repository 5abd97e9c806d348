// Attention within groups, forward, for Hopper: see ops/attention/common.py for what a group is.
//
// Floor: the bytes of queries, keys, values and outputs, each moved once, over the memory's bandwidth: at 64 rows x 256
// slots 51 FLOP a byte, of the 295 that keep an H100 busy.
//
// A block is persistent. Each of its consumer warpgroups takes items (group, 64 rows, head) of its own, adjacent heads
// side by side, and each has a warp of the producer warpgroup, which asks the copy engine for the item's queries and
// then, into a ring of tiles, for keys and values of 64 slots in turn, as far ahead as the ring reaches: over the ends
// of items. The queries' buffer, one of two, takes the output at last, and the copy engine brings it to its place.
// Nothing is copied or shifted before or after: boxes beyond a tensor's ends are zero when read and dropped when
// written.
//
// A tile never crosses from one neighbour to the next. Softmax is online, in fp32; probabilities are rounded to the
// query's dtype for their product with the values. Every (group, head) is computed by one warpgroup in one order.
#pragma once
#include "slots.cuh"

namespace retro_kernels {
namespace sm90 {

// Head sizes up to 64 or up to 128; what is beyond a head's size is zero. Shared memory of both is just below 227 KB.
template <int kDim>
struct Shape {
  static constexpr int kPanels = kDim / 64;
  static constexpr int kTile = kPanels * kPanel;            // bytes of 64 rows
  static constexpr int kConsumers = kDim == 64 ? 3 : 2;     // warpgroups
  static constexpr int kRing = kDim == 64 ? 7 : 5;          // tiles of a consumer
  static constexpr int kThreads = 128 * (kConsumers + 1);
  static constexpr int kConsumerRegisters = kDim == 64 ? 152 : 232;
  static constexpr int kProducerRegisters = kDim == 64 ? 56 : 40;
};

// What a consumer and its producer warp share. Tiles first, each a whole number of swizzled blocks; barriers last.
template <int kDim>
struct Channel {
  using S = Shape<kDim>;
  static constexpr int kTiles = 2 + S::kRing, kBarriers = 2 * kTiles;
  static constexpr size_t kBytes = S::kConsumers * (kTiles * S::kTile + kBarriers * 8);
  int consumer;

  RK_DEVICE Shared query(int i) const { return (consumer * kTiles + i) * S::kTile; }
  RK_DEVICE Shared ring(int i) const { return query(2 + i); }
  RK_DEVICE Shared barrier(int i) const {
    return S::kConsumers * kTiles * S::kTile + (consumer * kBarriers + i) * 8;
  }
  RK_DEVICE Shared query_full(int i) const { return barrier(i); }
  RK_DEVICE Shared query_empty(int i) const { return barrier(2 + i); }
  RK_DEVICE Shared full(int i) const { return barrier(4 + i); }
  RK_DEVICE Shared empty(int i) const { return barrier(4 + S::kRing + i); }
};

struct Item {
  int batch, chunk, neighbour, row, head;  // row: the first of 64 in its chunk or neighbour
  int token, sequence;                     // of its queries' boxes, with `neighbour`
  int tiles;                               // of slots; none for tokens that attend to nothing
};

RK_DEVICE Item item_of(const Forward& f, int i) {
  const Problem& p = f.p;
  const bool clock = p.grouping == kClock;
  const int neighbours = clock ? 1 : p.query_neighbours, chunks = clock ? p.groups : p.chunks;
  Item item;
  item.head = i % p.heads;
  i /= p.heads;
  item.row = i % f.row_tiles * kRows;
  i /= f.row_tiles;
  item.neighbour = i % neighbours;
  i /= neighbours;
  item.chunk = (clock ? p.first_group : 0) + i % chunks;
  item.batch = i / chunks;
  item.token = item.row + (clock ? static_cast<int>(p.first_token) + item.chunk * p.stride : 0);
  item.sequence = clock ? item.batch : item.batch * p.chunks + item.chunk;
  item.tiles = tiles_of_neighbour(p) * (clock ? p.neighbours : 1);
  if (item.chunk < 0 || item.chunk >= p.chunks) item.tiles = 0;
  return item;
}

template <int kDim>
RK_DEVICE void produce(const Forward& f, const Channel<kDim> channel) {
  using S = Shape<kDim>;
  const Problem& p = f.p;
  Place<2> query;
  Place<S::kRing> ring;
  for (int i = block_index() * S::kConsumers + channel.consumer; i < f.items; i += f.blocks * S::kConsumers) {
    const Item item = item_of(f, i);
    wait(channel.query_empty(query.at), query.parity ^ 1);  // the first time round it is empty
    arrive_expecting(channel.query_full(query.at), S::kPanels * f.box_rows * kPanelRow);
    for (int panel = 0; panel < S::kPanels; ++panel)
      load_box(f.query, channel.query(query.at) + panel * kPanel, channel.query_full(query.at), 64 * panel, item.head,
               item.token, item.neighbour, item.sequence);
    query.next();
    for (int tile = 0; tile < item.tiles; ++tile) {
      for (int part = 0; part < 2; ++part) {
        wait(channel.empty(ring.at), ring.parity ^ 1);
        arrive_expecting(channel.full(ring.at), S::kTile);
        for (int panel = 0; panel < S::kPanels; ++panel)
          load_box(part == 0 ? f.key : f.value, channel.ring(ring.at) + panel * kPanel, channel.full(ring.at),
                   64 * panel, item.head / (p.heads / p.kv_heads), first_slot(p, tile),
                   neighbour_of_tile(p, item.neighbour, tile), item.batch * p.chunks + item.chunk);
        ring.next();
      }
    }
  }
}

template <class T, int kDim>
RK_DEVICE void consume(const Forward& f, const Channel<kDim> channel) {
  using S = Shape<kDim>;
  const Problem& p = f.p;
  const int thread = thread_index() % 128, lane = lane_index();
  const float scale = p.scale * kLog2E;
  Place<2> query;
  Place<S::kRing> ring;
  // The buffer whose output is being stored, by its barrier; given back after the next item's first product.
  Shared stored = kNoBuffer;
  const auto give_back = [&] {
    if (thread == 0 && stored != kNoBuffer) {
      wait_for_stores();
      arrive(stored);
    }
    stored = kNoBuffer;
    warp_barrier();
  };
  for (int i = block_index() * S::kConsumers + channel.consumer; i < f.items; i += f.blocks * S::kConsumers) {
    const Item item = item_of(f, i);
    const Shared query_tile = channel.query(query.at);
    float out[kDim / 2], largest[2], total[2];
    MaskAhead mask;
    if (item.tiles > 0) mask.read(p, item.batch, item.chunk, item.neighbour, 0);
#pragma unroll
    for (int j = 0; j < kDim / 2; ++j) out[j] = 0.0f;
#pragma unroll
    for (int r = 0; r < 2; ++r) largest[r] = minus_infinity(), total[r] = 0.0f;
    wait(channel.query_full(query.at), query.parity);

    for (int tile = 0; tile < item.tiles; ++tile) {
      const Visible visible = visible_slots(p, tile, mask);
      if (tile + 1 < item.tiles) mask.read(p, item.batch, item.chunk, item.neighbour, tile + 1);
      const uint64_t mine = visible.slots >> (2 * (lane % 4));
      float score[kSlots / 2];
      wait(channel.full(ring.at), ring.parity);
      fence_products();
#pragma unroll
      for (int k = 0; k < kDim / 16; ++k) {
        const int at = k / 4 * kPanel + k % 4 * 32;
        multiply_rows(T(), score, rows_descriptor(query_tile + at), rows_descriptor(channel.ring(ring.at) + at), k > 0);
      }
      wait_for_products(score);
      if (lane == 0) arrive(channel.empty(ring.at));
      if (tile == 0) give_back();
      ring.next();

      uint32_t weights[kSlots / 16][4];
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        float highest = largest[r];
#pragma unroll
        for (int j = 0; j < kSlots / 8; ++j) {
#pragma unroll
          for (int c = 0; c < 2; ++c) {
            float& s = score[4 * j + 2 * r + c];
            s = mine >> (8 * j + c) & 1 ? multiply_rounded(s, scale) : minus_infinity();
            highest = larger(highest, s);
          }
        }
        highest = larger(highest, shuffle_xor(highest, 1));
        highest = larger(highest, shuffle_xor(highest, 2));
        const float base = base_of(highest);
        const float shrink = exp2_fast(largest[r] - base);
        largest[r] = highest;
        total[r] *= shrink;
#pragma unroll
        for (int j = 0; j < kDim / 8; ++j) out[4 * j + 2 * r] *= shrink, out[4 * j + 2 * r + 1] *= shrink;
#pragma unroll
        for (int j = 0; j < kSlots / 8; ++j) {
          const float first = exp2_fast(score[4 * j + 2 * r] - base);
          const float second = exp2_fast(score[4 * j + 2 * r + 1] - base);
          total[r] += first + second;
          weights[j / 2][j % 2 * 2 + r] = pack(T(), first, second);
        }
      }

      wait(channel.full(ring.at), ring.parity);
      const Shared values = channel.ring(ring.at);
      clear_hidden<kDim, 128>(values, visible.hidden, thread, 1 + channel.consumer);
      fence_products();
#pragma unroll
      for (int k = 0; k < kSlots / 16; ++k)
        add_columns(T(), out, weights[k], columns_descriptor(values + k * 2 * kBlock, kPanel));
      wait_for_products(out);
      if (lane == 0) arrive(channel.empty(ring.at));
      ring.next();
    }

    finish_rows<T, kDim>(p, query_tile, 1 + channel.consumer, item.token, f.box_rows,
                         item.batch * p.lse_stride.batch + item.head * p.lse_stride.head +
                             (p.grouping == kClock ? 0
                                                   : item.chunk * p.lse_stride.chunk +
                                                         item.neighbour * p.lse_stride.neighbour),
                         out, largest, total);
    give_back();  // of an item without tiles
    if (thread == 0)
      for (int panel = 0; panel < S::kPanels; ++panel)
        store_box(f.out, query_tile + panel * kPanel, 64 * panel, item.head, item.token, item.neighbour, item.sequence);
    warp_barrier();
    stored = channel.query_empty(query.at);
    query.next();
  }
  give_back();
}

template <class T, int kDim>
RK_KERNEL(Shape<kDim>::kThreads, 1) forward_kernel(RK_PARAMETER Forward f) {
  using S = Shape<kDim>;
  const int warpgroup = thread_index() / 128;
  if (thread_index() == 0) {
    for (int i = 0; i < S::kConsumers; ++i) {
      const Channel<kDim> c{i};
      for (int j = 0; j < 2; ++j) init_barrier(c.query_full(j), 1), init_barrier(c.query_empty(j), 1);
      for (int j = 0; j < S::kRing; ++j) init_barrier(c.full(j), 1), init_barrier(c.empty(j), 4);  // a warp each
    }
    fence_barriers();
  }
  block_barrier();
  if (warpgroup == S::kConsumers) {
    give_registers<S::kProducerRegisters>();
    const int consumer = thread_index() % 128 / 32;
    if (consumer < S::kConsumers && lane_index() == 0) produce<kDim>(f, Channel<kDim>{consumer});
  } else {
    take_registers<S::kConsumerRegisters>();
    consume<T, kDim>(f, Channel<kDim>{warpgroup});
  }
}

}  // namespace sm90
}  // namespace retro_kernels
