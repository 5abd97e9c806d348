// The backward on sm_80, of queries, keys and values in one launch: one program per (group, key/value head), which owns
// all queries that read its keys and all keys that its queries see. No atomics, one order: bitwise reproducible.
//
// Floor: a group of R rows and S slots moves 4 d (R + S) elements a head (query, key, value, out, grad_out in, three
// gradients out) and takes 10 R S d FLOPs in one pass, 64 FLOP a byte for 64 x 256 in 16 bits: it cannot take less than
// its bytes over the copy bandwidth (batch 8, n = 2048, 16 heads of 128: 1.34 GB, 0.67 ms at an A100's 2.0 TB/s). How
// close the kernel comes is unmeasured: it has run in the emulator only.
//
// A block of rows meets a tile of keys in shared memory; eight warps share the five products. Gradients of keys and
// values of a tile are summed in registers over the row blocks; the gradient of queries of a block over the tiles. Where
// there is one block (chunked cross-attention, 64 rows; self-attention, 128) or one tile (cross-attention, 64 keys), one
// pass does both. Otherwise (grouped heads with several tiles, long groups) a first sweep makes the gradient of the
// queries, and a second that of keys and values: seven products.
#pragma once
#include "../common/launch.cuh"
#include "../common/softmax.cuh"

namespace retro_kernels {
namespace sm80 {

template <int DIM, int ROWS, int KEYS>
struct BackwardShape {
  static constexpr int kWarps = 8, kThreads = 32 * kWarps;
  // Warps lie in a grid over the scores and the gradient of queries (16 rows each), and another over the gradients of
  // keys and values (16 keys each).
  static constexpr int kKeySplits = kWarps / (ROWS / 16), kColumnSplits = kWarps / (KEYS / 16);
  using Layout = TileLayout<DIM>;
  using Square = TileLayout<KEYS>;
  static constexpr Shared kQuery = 0, kGradOut = kQuery + Layout::bytes(ROWS), kKey = kGradOut + Layout::bytes(ROWS),
                          kValue = kKey + Layout::bytes(KEYS), kWeights = kValue + Layout::bytes(KEYS),
                          kGradScores = kWeights + Square::bytes(ROWS), kShift = kGradScores + Square::bytes(ROWS),
                          kDelta = kShift + 4 * ROWS, kWords = kDelta + 4 * ROWS;

  static size_t shared_bytes(int64_t slots) { return kWords + 8 * ceil_div(slots + 1, 64); }
};

template <int DIM, int THREADS>
RK_DEVICE void zero_rows(uint16_t* data, const Places& places, int first, int last) {
  for (int item = first * (DIM / 8) + thread_index(); item < last * (DIM / 8); item += THREADS)
    *reinterpret_cast<Vector16*>(data + places.at(item / (DIM / 8)) + item % (DIM / 8) * 8) = {0, 0, 0, 0};
}

// ONE_BLOCK: no group has more than ROWS rows, and no two query heads share keys.
//
// Two blocks share a multiprocessor, so that one computes while the other waits at its barriers or for its copies. Of a
// thread's 128 registers at most 64 may then hold sums while scores, which take 32, are made: so values are stored before
// the keys' sum begins where there is one block of rows, and where there are several, sums over tiles and sums over blocks
// are never under way at once. Heads of 128 in several blocks do not fit into 128 registers. (128 rows of more than 64
// take too much of an A100's shared memory for two; newer GPUs have more.)
template <class T, int DIM, int ROWS, int KEYS, bool ONE_BLOCK>
RK_KERNEL(256, DIM < 128 || (ONE_BLOCK && ROWS == 64) ? 2 : 1)
attention_backward(RK_PARAMETER Problem p) {
  using Shape = BackwardShape<DIM, ROWS, KEYS>;
  constexpr int kThreads = Shape::kThreads, kScoreTiles = KEYS / Shape::kKeySplits / 8;
  constexpr int kQueryColumns = DIM / Shape::kKeySplits, kKeyColumns = DIM / Shape::kColumnSplits;
  unsigned index = block_index();
  const int kv_head = index % p.kv_heads;
  index /= p.kv_heads;
  const Group g = group_at(p, index / p.groups, p.first_group + static_cast<int>(index % p.groups));
  const int heads_per_key = ONE_BLOCK ? 1 : p.heads / p.kv_heads;

  find_visible<kThreads>(p, g, Shape::kWords);
  block_barrier();
  const int tiles = (g.slots + KEYS - 1) / KEYS, row_blocks = ONE_BLOCK ? 1 : (g.rows + ROWS - 1) / ROWS;
  const int blocks = ONE_BLOCK ? 1 : row_blocks * heads_per_key;
  const auto visible = [&](int tile) -> uint64_t {
    const uint64_t word = shared_pointer<const uint64_t>(Shape::kWords)[tile * KEYS / 64];
    return KEYS == 64 ? word : word >> (tile * KEYS % 64) & ((uint64_t{1} << (KEYS % 64)) - 1);
  };
  const auto following = [&](int tile) {
    while (tile < tiles && visible(tile) == 0) ++tile;
    return tile;
  };
  const int first_tile = following(0);
  const bool sweeps = !ONE_BLOCK && following(first_tile + 1) < tiles;

  const Places grad_key = slot_places(p, g, p.grad_key_stride, kv_head);
  const Places grad_value = slot_places(p, g, p.grad_value_stride, kv_head);
  const auto head_of = [&](int block) { return kv_head * heads_per_key + block / row_blocks; };
  if (first_tile >= tiles || g.rows == 0) {  // nothing is seen: all gradients are 0
    for (int head = kv_head * heads_per_key; head < (kv_head + 1) * heads_per_key; ++head)
      zero_rows<DIM, kThreads>(p.grad_query, row_places(p, g, p.grad_query_stride, head), 0, g.rows);
    zero_rows<DIM, kThreads>(p.grad_key, grad_key, 0, g.slots);
    zero_rows<DIM, kThreads>(p.grad_value, grad_value, 0, g.slots);
    return;
  }

  const Places key = slot_places(p, g, p.key_stride, kv_head), value = slot_places(p, g, p.value_stride, kv_head);
  const auto start_keys = [&](int tile, Shared to, const uint16_t* data, const Places& places) {
    const uint64_t word = visible(tile);
    start_rows<DIM, KEYS, kThreads>(to, data, places, tile * KEYS,
                                    [&](int row, int) { return (word >> row & 1) != 0; });
  };
  // Queries, output gradients and lse of a block; the caller commits. Rows that do not exist see nothing.
  const auto start_block = [&](int block) {
    const int head = head_of(block), first = block % row_blocks * ROWS;
    const auto wanted = [&](int row, int = 0) { return first + row < g.rows; };
    start_rows<DIM, ROWS, kThreads>(Shape::kQuery, p.query, row_places(p, g, p.query_stride, head), first, wanted);
    start_rows<DIM, ROWS, kThreads>(Shape::kGradOut, p.grad_out, row_places(p, g, p.grad_out_stride, head), first, wanted);
    const Places lse = row_places(p, g, p.lse_stride, head);
    for (int row = thread_index(); row < ROWS; row += kThreads) {
      shared_pointer<float>(Shape::kShift)[row] = wanted(row) ? shift_of(p.lse[lse.at(first + row)]) : kNothing;
    }
  };
  // delta = sum of grad_out * out, less the gradient of the log-sum-exp, since dS = P (dP - delta + dlse); once the block
  // has landed; a barrier must follow. A row that saw nothing passes no gradient, whatever arrives for its lse.
  const auto find_delta = [&](int block) {
    constexpr int kShare = kThreads / ROWS;  // lanes of one row
    const int first = block % row_blocks * ROWS, row = thread_index() / kShare;
    const Places out = row_places(p, g, p.out_stride, head_of(block));
    float sum = 0.0f;
    if (first + row < g.rows) {
      const uint16_t* from = p.out + out.at(first + row);
#pragma unroll
      for (int i = 0; i < DIM / 8; i += kShare) {
        const int chunk = i + thread_index() % kShare;
        const Vector16 x = *reinterpret_cast<const Vector16*>(from + chunk * 8);
        const Vector16 y = *shared_pointer<const Vector16>(Shape::Layout::chunk(Shape::kGradOut, row, chunk));
        add_dot(T(), sum, x, y);
      }
    }
#pragma unroll
    for (int mask = 1; mask < kShare; mask *= 2) sum += shuffle_xor(sum, mask);
    if (thread_index() % kShare == 0) {
      if (p.grad_lse && shared_pointer<const float>(Shape::kShift)[row] != kNothing)
        sum -= p.grad_lse[row_places(p, g, p.lse_stride, head_of(block)).at(first + row)];
      shared_pointer<float>(Shape::kDelta)[row] = sum;
    }
  };

  const int row = warp_index() / Shape::kKeySplits * 16, split = warp_index() % Shape::kKeySplits;
  const int my_key = warp_index() / Shape::kColumnSplits * 16;
  const int my_column = warp_index() % Shape::kColumnSplits * kKeyColumns;
  // The weights and the gradient of the scores (without scale) of the block and the tile in shared memory go there, too.
  const float scale_log2 = p.scale * kLog2E;
  const auto score = [&](int tile, bool weights_too) {
    const int first_key = split * (KEYS / Shape::kKeySplits);
    float weights[kScoreTiles][4], grad[kScoreTiles][4];
    clear(weights);
    multiply<T, DIM, 2>(
        weights, [&](uint32_t(&a)[4], int k) { load_a<DIM>(a, Shape::kQuery, row, k); },
        [&](uint32_t(&b)[4], int k, int n) { load_b_transposed<DIM>(b, Shape::kKey, k, first_key + n); });
    clear(grad);
    multiply<T, DIM, 2>(
        grad, [&](uint32_t(&a)[4], int k) { load_a<DIM>(a, Shape::kGradOut, row, k); },
        [&](uint32_t(&b)[4], int k, int n) { load_b_transposed<DIM>(b, Shape::kValue, k, first_key + n); });
    int lane = lane_index();
    if (DIM > 64) renew(lane);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int y = row + lane / 4 + 8 * half;
      const float shift = shared_pointer<const float>(Shape::kShift)[y];
      const float delta = shared_pointer<const float>(Shape::kDelta)[y];
      static_assert(KEYS / Shape::kKeySplits <= 32, "a warp's slots have a bit each");
      const auto bits = static_cast<uint32_t>(visible(tile) >> (first_key + lane % 4 * 2));
      const uint32_t seen = shift == kNothing ? 0 : bits;
#pragma unroll
      for (int n = 0; n < kScoreTiles; ++n) {
        float w[2], d[2];
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          const float weight = exp2_bounded(weights[n][2 * half + e] * scale_log2 - shift);
          w[e] = seen >> (8 * n + e) & 1 ? weight : 0.0f;
          d[e] = w[e] * (grad[n][2 * half + e] - delta);
        }
        const int x = first_key + 8 * n + lane % 4 * 2;
        if (weights_too) *shared_pointer<uint32_t>(Shape::Square::pair(Shape::kWeights, y, x)) = pack(T(), w[0], w[1]);
        *shared_pointer<uint32_t>(Shape::Square::pair(Shape::kGradScores, y, x)) = pack(T(), d[0], d[1]);
      }
    }
  };
  float grad_rows[kQueryColumns / 8][4];  // of queries: 16 rows from `row` on, columns from split * kQueryColumns on
  const auto add_grad_rows = [&] {
    multiply<T, KEYS, 2>(
        grad_rows, [&](uint32_t(&a)[4], int k) { load_a<KEYS>(a, Shape::kGradScores, row, k); },
        [&](uint32_t(&b)[4], int k, int n) { load_b<DIM>(b, Shape::kKey, k, split * kQueryColumns + n); });
  };
  const auto store_grad_rows = [&](int block) {
    const Places places = row_places(p, g, p.grad_query_stride, head_of(block));
    const float factor[2] = {p.scale, p.scale};
    uint16_t* to[2];
    bool wanted[2];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int i = block % row_blocks * ROWS + row + lane_index() / 4 + 8 * half;
      wanted[half] = i < g.rows;
      to[half] = p.grad_query + places.at(i) + split * kQueryColumns;
    }
    store_rows<T>(grad_rows, factor, to, wanted);
  };

  // The gradient of the tile's keys or values, of which `sums` has this warp's part.
  const auto store_slots = [&](int tile, float(&sums)[kKeyColumns / 8][4], float by, uint16_t* data, const Places& places) {
    const float factor[2] = {by, by};
    uint16_t* to[2];
    bool wanted[2];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int slot = tile * KEYS + my_key + lane_index() / 4 + 8 * half;
      wanted[half] = slot < g.slots;
      if (p.mask && !(visible(tile) >> (slot % KEYS) & 1)) clear_row(sums, half);
      to[half] = data + (wanted[half] ? places.at(slot) : 0) + my_column;
    }
    store_rows<T>(sums, factor, to, wanted);
  };

  if (sweeps)
    for (int block = 0; block < blocks; ++block) {
      block_barrier();
      start_block(block);
      clear(grad_rows);
      for (int tile = first_tile; tile < tiles; tile = following(tile + 1)) {
        start_keys(tile, Shape::kKey, p.key, key);
        start_keys(tile, Shape::kValue, p.value, value);
        copy_commit();
        copy_wait<0>();
        block_barrier();
        if (tile == first_tile) {
          find_delta(block);
          block_barrier();
        }
        score(tile, false);
        block_barrier();
        add_grad_rows();
        block_barrier();
      }
      store_grad_rows(block);
    }

  int loaded = -1, tile_ahead = -1;  // the block in shared memory; the tile whose copies are under way
  for (int tile = 0; tile < tiles; ++tile) {
    if (visible(tile) == 0) {
      const int last = (tile + 1) * KEYS;
      zero_rows<DIM, kThreads>(p.grad_key, grad_key, tile * KEYS, last < g.slots ? last : g.slots);
      zero_rows<DIM, kThreads>(p.grad_value, grad_value, tile * KEYS, last < g.slots ? last : g.slots);
      continue;
    }
    if (tile_ahead != tile) {
      start_keys(tile, Shape::kKey, p.key, key);
      start_keys(tile, Shape::kValue, p.value, value);
    }
    const int next = following(tile + 1);
    float grad_keys[kKeyColumns / 8][4], grad_values[kKeyColumns / 8][4];
    if (!ONE_BLOCK) clear(grad_keys);
    clear(grad_values);
    for (int block = 0; block < blocks; ++block) {
      const bool fresh = block != loaded;
      if (fresh) {
        if (loaded >= 0) block_barrier();  // all are done with the block before
        start_block(block);
        loaded = block;
      }
      copy_commit();
      copy_wait<0>();
      block_barrier();
      if (fresh) {
        find_delta(block);
        block_barrier();
      }
      score(tile, true);
      block_barrier();
      const bool ahead = block == blocks - 1 && next < tiles;  // values, then keys, are free for the next tile
      if (ahead) start_keys(next, Shape::kValue, p.value, value);
      if (!sweeps) {
        if (!ONE_BLOCK || tile == first_tile) clear(grad_rows);
        add_grad_rows();
        if (!ONE_BLOCK || next >= tiles) store_grad_rows(block);
      }
      if (ahead) {
        block_barrier();
        start_keys(next, Shape::kKey, p.key, key);
        tile_ahead = next;
      }
      multiply<T, ROWS, 2>(
          grad_values, [&](uint32_t(&a)[4], int k) { load_a_transposed<KEYS>(a, Shape::kWeights, my_key, k); },
          [&](uint32_t(&b)[4], int k, int n) { load_b<DIM>(b, Shape::kGradOut, k, my_column + n); });
      if (ONE_BLOCK) {
        store_slots(tile, grad_values, 1.0f, p.grad_value, grad_value);
        clear(grad_keys);
      }
      multiply<T, ROWS, 2>(
          grad_keys, [&](uint32_t(&a)[4], int k) { load_a_transposed<KEYS>(a, Shape::kGradScores, my_key, k); },
          [&](uint32_t(&b)[4], int k, int n) { load_b<DIM>(b, Shape::kQuery, k, my_column + n); });
    }
    if (!ONE_BLOCK) store_slots(tile, grad_values, 1.0f, p.grad_value, grad_value);
    store_slots(tile, grad_keys, p.scale, p.grad_key, grad_key);
  }
}

}  // namespace sm80
}  // namespace retro_kernels
