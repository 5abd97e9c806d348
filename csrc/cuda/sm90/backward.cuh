// Attention within groups, backward of queries, keys and values in one launch, for Hopper. No atomics, one order:
// bitwise reproducible.
//
// Floor: a group of R rows and S slots moves 4 d (R + S) elements a head (query, key, value, out, grad_out in, three
// gradients out) and takes 10 R S d FLOPs in one pass, 64 FLOP a byte for 64 x 256 in 16 bits, of the 295 that keep an
// H100 busy: its bytes over the copy bandwidth (batch 8, n = 2048, 16 heads of 128: 1.34 GB, 0.45 ms at 3.0 TB/s). How
// close the kernel comes is unmeasured: it has run in the emulator only.
//
// A channel owns items (group, key/value head): all blocks of 64 rows that read its keys and all tiles of 64 slots that
// they see. A block of rows is three boxes (query, grad_out, out), a tile of slots two (key, value); each kind has a
// ring that a producer warp fills as far ahead as it reaches, over the ends of items. What is done goes back through
// the same buffers: grad_query in the query's, grad_key and grad_value in the key's and the value's.
//
// Head sizes up to 64: one warpgroup a channel, two channels a block. Up to 128: two warpgroups share one channel, each
// with the gradients of 64 of the columns; both compute the scores of all, which costs two products more than five and
// saves their exchange.
//
// The scores stand as slots x rows, so that weights and their gradients are, in the registers they come in, the left
// factors of grad_value += weights . grad_out and grad_key += grad_scores . query; on the way to
// grad_query += grad_scores^T . key they go through shared memory, where the product takes them transposed.
//
// One pass does it all where a group has one block of rows (chunked cross-attention) or one tile of slots (the
// encoder's cross-attention). Otherwise (its self-attention, grouped heads) a first sweep makes grad_query, a second
// grad_key and grad_value: seven products for five, and everything is read twice, the second time from L2.
#pragma once
#include "slots.cuh"

namespace retro_kernels {
namespace sm90 {

enum Passes : int { kOneBlock, kOneTile, kTwoSweeps };

template <int kDim>
struct BackwardShape {
  static constexpr int kPanels = kDim / 64;       // of 64 columns: warpgroups that share a channel
  static constexpr int kChannels = 2 / kPanels;
  static constexpr int kTile = kPanels * kPanel;  // bytes of 64 rows
  static constexpr int kRowStages = 2, kSlotStages = 3;
  static constexpr int kThreads = 3 * 128, kConsumerRegisters = 232, kProducerRegisters = 40;
  // Of a channel: rows, slots, and the scores' gradient of each warpgroup. Then all warpgroups' shift and delta,
  // and barriers.
  static constexpr int kTiles = (3 * kRowStages + 2 * kSlotStages) * kTile + kPanels * kPanel;
  static constexpr int kNumbers = 2 * kRows * 4, kBarriers = 2 * (kRowStages + kSlotStages);
  static constexpr size_t kBytes = kChannels * (kTiles + kBarriers * 8) + 2 * kNumbers;
};

template <int kDim>
struct BackwardChannel {
  using S = BackwardShape<kDim>;
  int channel;

  RK_DEVICE Shared query(int stage) const { return channel * S::kTiles + 3 * stage * S::kTile; }
  RK_DEVICE Shared grad_out(int stage) const { return query(stage) + S::kTile; }
  RK_DEVICE Shared out(int stage) const { return query(stage) + 2 * S::kTile; }
  RK_DEVICE Shared key(int stage) const { return query(S::kRowStages) + 2 * stage * S::kTile; }
  RK_DEVICE Shared value(int stage) const { return key(stage) + S::kTile; }
  RK_DEVICE Shared grad_scores(int panel) const { return key(S::kSlotStages) + panel * kPanel; }
  RK_DEVICE Shared shift(int panel) const {
    return S::kChannels * S::kTiles + (channel * S::kPanels + panel) * S::kNumbers;
  }
  RK_DEVICE Shared delta(int panel) const { return shift(panel) + kRows * 4; }
  RK_DEVICE Shared barrier(int i) const {
    return S::kChannels * S::kTiles + 2 * S::kNumbers + (channel * S::kBarriers + i) * 8;
  }
  RK_DEVICE Shared rows_full(int stage) const { return barrier(stage); }
  RK_DEVICE Shared rows_empty(int stage) const { return barrier(S::kRowStages + stage); }
  RK_DEVICE Shared slots_full(int stage) const { return barrier(2 * S::kRowStages + stage); }
  RK_DEVICE Shared slots_empty(int stage) const { return barrier(2 * S::kRowStages + S::kSlotStages + stage); }

  // Named barriers, of a warpgroup and of all that share the channel.
  RK_DEVICE void meet(int panel) const { named_barrier(1 + channel * S::kPanels + panel, 128); }
  RK_DEVICE int shared_barrier() const { return 3 + channel; }
  RK_DEVICE void meet_all() const { named_barrier(shared_barrier(), 128 * S::kPanels); }
};

// A group and a key/value head. Under kClock those are all that a sequence's tokens and its chunks need: tokens that
// attend to nothing have no tiles, and the boxes of rows of surplus chunks lie beyond the tensor's ends.
struct Owned {
  int batch, chunk, neighbour, kv_head;
  int tiles;
};

RK_DEVICE Owned owned_at(const Backward& f, int i) {
  const Problem& p = f.p;
  const int neighbours = p.grouping == kNeighbour ? p.neighbours : 1;
  Owned o;
  o.kv_head = i % p.kv_heads;
  i /= p.kv_heads;
  o.neighbour = i % neighbours;
  i /= neighbours;
  const int chunks = p.groups / neighbours;
  o.chunk = p.first_group + i % chunks;
  o.batch = i / chunks;
  o.tiles = tiles_of_neighbour(p) * (p.grouping == kClock ? p.neighbours : 1);
  if (o.chunk < 0 || o.chunk >= p.chunks) o.tiles = 0;
  return o;
}

// Where a block of 64 rows is: the place of its boxes.
struct Block {
  int head, token, neighbour, sequence;
};

RK_DEVICE Block block_at(const Backward& f, const Owned& o, int block) {
  const Problem& p = f.p;
  const bool clock = p.grouping == kClock;
  Block b;
  b.token = block % f.row_tiles * kRows + (clock ? static_cast<int>(p.first_token) + o.chunk * p.stride : 0);
  block /= f.row_tiles;
  b.neighbour = o.neighbour;
  if (p.grouping == kChunk) {
    b.neighbour = block % p.query_neighbours;
    block /= p.query_neighbours;
  }
  b.head = o.kv_head * (p.heads / p.kv_heads) + block;
  b.sequence = clock ? o.batch : o.batch * p.chunks + o.chunk;
  return b;
}

// ---- the producer

template <int kDim>
RK_DEVICE void load_rows(const Backward& f, const BackwardChannel<kDim> c, Place<BackwardShape<kDim>::kRowStages>& at,
                         const Owned& o, int block) {
  using S = BackwardShape<kDim>;
  const Block b = block_at(f, o, block);
  const Shared full = c.rows_full(at.at);
  wait(c.rows_empty(at.at), at.parity ^ 1);  // the first time round it is empty
  arrive_expecting(full, 3 * S::kPanels * f.box_rows * kPanelRow);
  for (int panel = 0; panel < S::kPanels; ++panel) {
    const Shared to = panel * kPanel;
    load_box(f.query, c.query(at.at) + to, full, 64 * panel, b.head, b.token, b.neighbour, b.sequence);
    load_box(f.grad_out, c.grad_out(at.at) + to, full, 64 * panel, b.head, b.token, b.neighbour, b.sequence);
    load_box(f.out, c.out(at.at) + to, full, 64 * panel, b.head, b.token, b.neighbour, b.sequence);
  }
  at.next();
}

template <int kDim>
RK_DEVICE void load_slots(const Backward& f, const BackwardChannel<kDim> c, Place<BackwardShape<kDim>::kSlotStages>& at,
                          const Owned& o, int tile) {
  using S = BackwardShape<kDim>;
  const int slot = first_slot(f.p, tile), neighbour = neighbour_of_tile(f.p, o.neighbour, tile);
  const int sequence = o.batch * f.p.chunks + o.chunk;
  const Shared full = c.slots_full(at.at);
  wait(c.slots_empty(at.at), at.parity ^ 1);
  arrive_expecting(full, 2 * S::kTile);
  for (int panel = 0; panel < S::kPanels; ++panel) {
    load_box(f.key, c.key(at.at) + panel * kPanel, full, 64 * panel, o.kv_head, slot, neighbour, sequence);
    load_box(f.value, c.value(at.at) + panel * kPanel, full, 64 * panel, o.kv_head, slot, neighbour, sequence);
  }
  at.next();
}

// In the order in which `consume` takes them.
template <int kDim, int kPasses>
RK_DEVICE void produce(const Backward& f, const BackwardChannel<kDim> c) {
  using S = BackwardShape<kDim>;
  Place<S::kRowStages> rows;
  Place<S::kSlotStages> slots;
  for (int i = block_index() * S::kChannels + c.channel; i < f.items; i += f.blocks * S::kChannels) {
    const Owned o = owned_at(f, i);
    if (kPasses != kOneTile)
      for (int block = 0; block < f.row_blocks; ++block) {
        load_rows(f, c, rows, o, block);
        for (int tile = 0; tile < o.tiles; ++tile) load_slots(f, c, slots, o, tile);
      }
    if (kPasses != kOneBlock)
      for (int tile = 0; tile < o.tiles; ++tile) {
        load_slots(f, c, slots, o, tile);
        for (int block = 0; block < f.row_blocks; ++block) load_rows(f, c, rows, o, block);
      }
  }
}

// ---- a consumer warpgroup

// Waits for a block of rows and finds the shift of its logits, and its delta = sum of grad_out * out, less the gradient
// of the log-sum-exp, since dS = P (dP - delta + dlse). A row that saw nothing passes no gradient.
template <class T, int kDim>
RK_DEVICE void take_rows(const Backward& f, const BackwardChannel<kDim> c, int panel,
                         const Place<BackwardShape<kDim>::kRowStages>& at, const Owned& o, int block) {
  const Problem& p = f.p;
  const Block b = block_at(f, o, block);
  const int half = thread_index() % 2, row = thread_index() % 128 / 2, token = b.token + row;
  const bool there = row < f.box_rows && token >= 0 && token < p.tokens;
  float shift = kNothing, delta = 0.0f;
  if (there) {
    const int64_t place = o.batch * p.lse_stride.batch + b.head * p.lse_stride.head + token * p.lse_stride.token +
                          (p.grouping == kClock ? 0 : o.chunk * p.lse_stride.chunk + b.neighbour * p.lse_stride.neighbour);
    shift = shift_of(p.lse[place]);
    if (p.grad_lse && half == 0 && shift != kNothing) delta = -p.grad_lse[place];
  }
  wait(c.rows_full(at.at), at.parity);
  if (there) {
#pragma unroll
    for (int part = half; part < kDim / 8; part += 2) {
      const int place = part / 8 * kPanel + swizzled(row, part % 8 * 16);
      add_dot(T(), delta, *shared_pointer<const Vector16>(c.grad_out(at.at) + place),
              *shared_pointer<const Vector16>(c.out(at.at) + place));
    }
  }
  delta += shuffle_xor(delta, 1);
  if (half == 0) {
    shared_pointer<float>(c.shift(panel))[row] = shift;
    shared_pointer<float>(c.delta(panel))[row] = delta;
  }
  c.meet(panel);
}

// Waits for a tile of slots -> which of them are visible, and reads the mask of the next. Hidden keys are cleared: the
// gradients of their scores are 0, and meet them in grad_query. (Hidden values meet nothing but their own row of scores.)
template <int kDim>
RK_DEVICE uint64_t take_slots(const Backward& f, const BackwardChannel<kDim> c, int panel,
                              const Place<BackwardShape<kDim>::kSlotStages>& at, const Owned& o, int tile,
                              MaskAhead& mask) {
  using S = BackwardShape<kDim>;
  const Visible visible = visible_slots(f.p, tile, mask);
  if (tile + 1 < o.tiles) mask.read(f.p, o.batch, o.chunk, o.neighbour, tile + 1);
  wait(c.slots_full(at.at), at.parity);
  clear_hidden<kDim, 128 * S::kPanels>(c.key(at.at), visible.hidden, panel * 128 + thread_index() % 128,
                                       c.shared_barrier());
  return visible.slots;
}

// Stages of rows and of slots whose gradients are being stored, a bit each. They are given back after the next products,
// when the copy engine has long read them: all four warps would wait for one that waits before.
struct Stored {
  uint32_t stages = 0;

  template <int kDim>
  RK_DEVICE void give_back(const BackwardChannel<kDim> c) {
    using S = BackwardShape<kDim>;
    if (thread_index() % 128 == 0 && stages) {
      wait_for_stores();
#pragma unroll
      for (int i = 0; i < S::kRowStages + S::kSlotStages; ++i)
        if (stages >> i & 1) arrive(i < S::kRowStages ? c.rows_empty(i) : c.slots_empty(i - S::kRowStages));
    }
    stages = 0;
    warp_barrier();
  }
};

RK_DEVICE void clear(float (&sum)[32]) {
#pragma unroll
  for (int i = 0; i < 32; ++i) sum[i] = 0.0f;
}

enum Sum : int { kNone, kFresh, kAdded };  // not made, begun anew, added to

// A block of rows and a tile of slots, at `rows` and `slots` in their rings: makes `kQuery` of grad_query and `kKeys`
// of grad_key and grad_value, and gives back what is `stored`. At the end all warps of this warpgroup have multiplied
// with both.
template <class T, int kDim, Sum kQuery, Sum kKeys>
RK_DEVICE void meet_rows_and_slots(const Backward& f, const BackwardChannel<kDim> c, int panel, int rows, int slots,
                                   uint64_t visible, Stored& stored, float (&grad_query)[32],
                                   float (&grad_key)[32], float (&grad_value)[32]) {
  const int lane = lane_index(), first = warp_index() % 4 * 16 + lane / 4;  // this thread's slots: `first` and 8 on
  const float scale = f.p.scale * kLog2E;
  float weight[32], grad[32];
  renew(slots);  // the descriptors of a tile that many blocks meet would not leave the sums enough registers
  fence_products();
#pragma unroll
  for (int k = 0; k < kDim / 16; ++k) {
    const int at = k / 4 * kPanel + k % 4 * 32;
    multiply_rows(T(), weight, rows_descriptor(c.key(slots) + at), rows_descriptor(c.query(rows) + at), k > 0);
  }
#pragma unroll
  for (int k = 0; k < kDim / 16; ++k) {
    const int at = k / 4 * kPanel + k % 4 * 32;
    multiply_rows(T(), grad, rows_descriptor(c.value(slots) + at), rows_descriptor(c.grad_out(rows) + at), k > 0);
  }
  wait_for_products(weight, grad);
  stored.give_back(c);

  const float* shift = shared_pointer<const float>(c.shift(panel));
  const float* delta = shared_pointer<const float>(c.delta(panel));
  uint32_t weights[4][4], grads[4][4];  // left factors: 16 rows each
#pragma unroll
  for (int j = 0; j < 8; ++j) {
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      const int row = 8 * j + lane % 4 * 2 + e;
      const float shift_of_row = shift[row], delta_of_row = delta[row];
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        // asked of both, as what is not seen may be NaN
        const bool seen = (visible >> (first + 8 * r) & 1) != 0 && shift_of_row != kNothing;
        float& w = weight[4 * j + 2 * r + e];
        float& g = grad[4 * j + 2 * r + e];
        w = seen ? exp2_bounded(w * scale - shift_of_row) : 0.0f;
        g = seen ? w * (g - delta_of_row) : 0.0f;
      }
    }
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      weights[j / 2][j % 2 * 2 + r] = pack(T(), weight[4 * j + 2 * r], weight[4 * j + 2 * r + 1]);
      grads[j / 2][j % 2 * 2 + r] = pack(T(), grad[4 * j + 2 * r], grad[4 * j + 2 * r + 1]);
    }
  }
  if (kQuery) {
#pragma unroll
    for (int r = 0; r < 2; ++r)
#pragma unroll
      for (int j = 0; j < 8; ++j)
        *shared_pointer<uint32_t>(c.grad_scores(panel) + swizzled(first + 8 * r, j * 16) + lane % 4 * 4) =
            grads[j / 2][j % 2 * 2 + r];
    fence_async();
    c.meet(panel);
  }

  if (kKeys == kFresh) {
    clear(grad_value);
    clear(grad_key);
  }
  if (kKeys) {
    settle(grad_value);
    settle(grad_key);
  }
  if (kQuery == kAdded) settle(grad_query);
  fence_products();
  if (kQuery)
#pragma unroll
    for (int k = 0; k < 4; ++k)
      multiply_transposed(T(), grad_query, columns_descriptor(c.grad_scores(panel) + k * 2 * kBlock, kPanel),
                          columns_descriptor(c.key(slots) + panel * kPanel + k * 2 * kBlock, kPanel),
                          kQuery == kAdded || k > 0);
  if (kKeys) {
#pragma unroll
    for (int k = 0; k < 4; ++k)
      add_columns(T(), grad_value, weights[k],
                  columns_descriptor(c.grad_out(rows) + panel * kPanel + k * 2 * kBlock, kPanel));
#pragma unroll
    for (int k = 0; k < 4; ++k)
      add_columns(T(), grad_key, grads[k],
                  columns_descriptor(c.query(rows) + panel * kPanel + k * 2 * kBlock, kPanel));
  }
  if constexpr (kQuery != kNone && kKeys != kNone)
    wait_for_products(grad_value, grad_key, grad_query);
  else if constexpr (kKeys != kNone)
    wait_for_products(grad_value, grad_key);
  else
    wait_for_products(grad_query);
  c.meet(panel);
}

// This warpgroup's columns of a gradient into its panel of a tile, 0 in rows that are not `wanted` (a bit each): rows
// that no box fills anew, and those of hidden slots, whose weights of 0 may have met NaN.
template <class T>
RK_DEVICE void put(Shared panel, const float (&sum)[32], float factor, uint64_t wanted) {
  const int lane = lane_index(), first = warp_index() % 4 * 16 + lane / 4;
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const bool here = wanted >> (first + 8 * r) & 1;
#pragma unroll
    for (int j = 0; j < 8; ++j) {
      const float x = sum[4 * j + 2 * r], y = sum[4 * j + 2 * r + 1];
      *shared_pointer<uint32_t>(panel + swizzled(first + 8 * r, j * 16) + lane % 4 * 4) =
          here ? pack(T(), x * factor, y * factor) : 0u;
    }
  }
}

// Begins to store grad_query from the query's place; the buffers of the block are `stored` then.
template <class T, int kDim>
RK_DEVICE void store_rows(const Backward& f, const BackwardChannel<kDim> c, int panel, int stage, const Owned& o,
                          int block, const float (&grad_query)[32], Stored& stored) {
  const Shared tile = c.query(stage) + panel * kPanel;
  c.meet_all();  // the other warpgroup has multiplied with the queries too
  put<T>(tile, grad_query, f.p.scale, ~uint64_t{0} >> (kRows - f.box_rows));
  fence_async();
  c.meet(panel);
  if (thread_index() % 128 == 0) {
    const Block b = block_at(f, o, block);
    store_box(f.grad_query, tile, 64 * panel, b.head, b.token, b.neighbour, b.sequence);
  }
  warp_barrier();
  if (o.tiles == 0) stored.give_back(c);  // no products have
  stored.stages |= 1u << stage;
}

// The same of a tile of slots.
template <class T, int kDim>
RK_DEVICE void store_slots(const Backward& f, const BackwardChannel<kDim> c, int panel, int stage, const Owned& o,
                           int tile, uint64_t visible, const float (&grad_key)[32],
                           const float (&grad_value)[32], Stored& stored) {
  const Shared key = c.key(stage) + panel * kPanel, value = c.value(stage) + panel * kPanel;
  c.meet_all();
  put<T>(key, grad_key, f.p.scale, visible);
  put<T>(value, grad_value, 1.0f, visible);
  fence_async();
  c.meet(panel);
  if (thread_index() % 128 == 0) {
    const int slot = first_slot(f.p, tile), neighbour = neighbour_of_tile(f.p, o.neighbour, tile);
    const int sequence = o.batch * f.p.chunks + o.chunk;
    store_box(f.grad_key, key, 64 * panel, o.kv_head, slot, neighbour, sequence);
    store_box(f.grad_value, value, 64 * panel, o.kv_head, slot, neighbour, sequence);
  }
  warp_barrier();
  stored.stages |= 1u << (BackwardShape<kDim>::kRowStages + stage);
}

template <class T, int kDim, int kPasses>
RK_DEVICE void consume(const Backward& f, const BackwardChannel<kDim> c, int panel) {
  using S = BackwardShape<kDim>;
  const bool speaks = thread_index() % 128 == 0;
  Place<S::kRowStages> rows;
  Place<S::kSlotStages> slots;
  Stored stored;
  MaskAhead mask;
  for (int i = block_index() * S::kChannels + c.channel; i < f.items; i += f.blocks * S::kChannels) {
    const Owned o = owned_at(f, i);
    float grad_query[32], grad_key[32], grad_value[32];
    if (kPasses != kOneTile)
      for (int block = 0; block < f.row_blocks; ++block) {
        if (o.tiles > 0) mask.read(f.p, o.batch, o.chunk, o.neighbour, 0);
        take_rows<T>(f, c, panel, rows, o, block);
        clear(grad_query);
        for (int tile = 0; tile < o.tiles; ++tile) {
          const uint64_t visible = take_slots(f, c, panel, slots, o, tile, mask);
          meet_rows_and_slots<T, kDim, kAdded, kPasses == kOneBlock ? kFresh : kNone>(
              f, c, panel, rows.at, slots.at, visible, stored, grad_query, grad_key, grad_value);
          if (kPasses == kOneBlock)
            store_slots<T>(f, c, panel, slots.at, o, tile, visible, grad_key, grad_value, stored);
          else if (speaks)
            arrive(c.slots_empty(slots.at));
          slots.next();
        }
        store_rows<T>(f, c, panel, rows.at, o, block, grad_query, stored);
        rows.next();
      }
    if (kPasses != kOneBlock) {
      if (o.tiles > 0) mask.read(f.p, o.batch, o.chunk, o.neighbour, 0);
      for (int tile = 0; tile < o.tiles; ++tile) {
        const uint64_t visible = take_slots(f, c, panel, slots, o, tile, mask);
        clear(grad_key);
        clear(grad_value);
        for (int block = 0; block < f.row_blocks; ++block) {
          take_rows<T>(f, c, panel, rows, o, block);
          meet_rows_and_slots<T, kDim, kPasses == kOneTile ? kFresh : kNone, kAdded>(
              f, c, panel, rows.at, slots.at, visible, stored, grad_query, grad_key, grad_value);
          if (kPasses == kOneTile)
            store_rows<T>(f, c, panel, rows.at, o, block, grad_query, stored);
          else if (speaks)
            arrive(c.rows_empty(rows.at));
          rows.next();
        }
        store_slots<T>(f, c, panel, slots.at, o, tile, visible, grad_key, grad_value, stored);
        slots.next();
      }
    }
  }
  stored.give_back(c);
}

template <class T, int kDim, int kPasses>
RK_KERNEL(BackwardShape<kDim>::kThreads, 1) backward_kernel(RK_PARAMETER Backward f) {
  using S = BackwardShape<kDim>;
  const int warpgroup = thread_index() / 128;
  // Rows beyond a box are read by products and never filled.
  if (f.box_rows < kRows)
    for (int channel = 0; channel < S::kChannels; ++channel)
      for (int i = thread_index() * 16; i < 3 * S::kRowStages * S::kTile; i += S::kThreads * 16)
        *shared_pointer<Vector16>(BackwardChannel<kDim>{channel}.query(0) + i) = Vector16{};
  fence_async();
  if (thread_index() == 0) {
    for (int channel = 0; channel < S::kChannels; ++channel) {
      const BackwardChannel<kDim> c{channel};
      for (int j = 0; j < S::kRowStages; ++j)
        init_barrier(c.rows_full(j), 1), init_barrier(c.rows_empty(j), S::kPanels);
      for (int j = 0; j < S::kSlotStages; ++j)
        init_barrier(c.slots_full(j), 1), init_barrier(c.slots_empty(j), S::kPanels);
    }
    fence_barriers();
  }
  block_barrier();
  if (warpgroup == 2) {
    give_registers<S::kProducerRegisters>();
    const int channel = thread_index() % 128 / 32;
    if (channel < S::kChannels && lane_index() == 0) produce<kDim, kPasses>(f, BackwardChannel<kDim>{channel});
  } else {
    take_registers<S::kConsumerRegisters>();
    consume<T, kDim, kPasses>(f, BackwardChannel<kDim>{warpgroup / S::kPanels}, warpgroup % S::kPanels);
  }
}

}  // namespace sm90
}  // namespace retro_kernels
