// The forward on sm_80: one program per (group, tile of rows, query head), keys and values in tiles of 64 slots.
//
// Floor: a group of R rows and S slots moves 2 d (R + S) elements a head (query, key, value in, out out) and takes
// 4 R S d FLOPs, so 51 FLOP a byte for chunked cross-attention's 64 x 256 in 16 bits: it cannot take less than its
// bytes over the copy bandwidth (batch 8, n = 2048, 16 heads of 128: 0.67 GB, 0.33 ms at an A100's 2.0 TB/s). Keys and
// values are read once if a tile holds all rows of the group; otherwise programs of one group run side by side and find
// them in the L2 cache. How close the kernel comes is unmeasured: it has run in the emulator only.
//
// Each warp owns 16 rows. Keys and values come by cp.async, the next tile while this one is multiplied; tiles without a
// visible slot are left out, masked slots are not read (zeros take their place).
#pragma once
#include "../common/launch.cuh"
#include "../common/softmax.cuh"

namespace retro_kernels {
namespace sm80 {

template <int DIM, int WARPS>
struct ForwardShape {
  static constexpr int kRows = 16 * WARPS, kKeys = 64, kThreads = 32 * WARPS;
  using Layout = TileLayout<DIM>;
  static constexpr Shared kQuery = 0, kKey = Layout::bytes(kRows), kValue = kKey + 2 * Layout::bytes(kKeys),
                          kWords = kValue + 2 * Layout::bytes(kKeys);

  static size_t shared_bytes(int64_t slots) { return kWords + 8 * ceil_div(slots + 1, 64); }
};

template <class T, int DIM, int WARPS>
RK_KERNEL(32 * WARPS, WARPS == 4 && DIM == 64 ? 3 : WARPS == 4 ? 2 : 1)
attention_forward(RK_PARAMETER Problem p) {
  using Shape = ForwardShape<DIM, WARPS>;
  using Layout = typename Shape::Layout;
  constexpr int kRows = Shape::kRows, kKeys = Shape::kKeys, kThreads = Shape::kThreads;
  const int most_rows = p.grouping == kClock ? p.stride : p.tokens * p.query_neighbours;
  const unsigned row_tiles = (most_rows + kRows - 1) / kRows;
  unsigned index = block_index();
  const int head = index % p.heads;
  index /= p.heads;
  const int first_row = index % row_tiles * kRows;
  index /= row_tiles;
  const Group g = group_at(p, index / p.groups, p.first_group + static_cast<int>(index % p.groups));
  if (first_row >= g.rows) return;

  find_visible<kThreads>(p, g, Shape::kWords);
  const Places query = row_places(p, g, p.query_stride, head);
  start_rows<DIM, kRows, kThreads>(Shape::kQuery, p.query, query, first_row,
                                   [&](int row, int) { return first_row + row < g.rows; });
  block_barrier();

  const int kv_head = head / (p.heads / p.kv_heads);
  const Places key = slot_places(p, g, p.key_stride, kv_head), value = slot_places(p, g, p.value_stride, kv_head);
  const int tiles = (g.slots + kKeys - 1) / kKeys;
  const auto visible = [&](int tile) { return shared_pointer<const uint64_t>(Shape::kWords)[tile]; };
  const auto start_tile = [&](int tile, int stage) {
    const uint64_t mine = visible(tile) >> RowsOfThread<DIM, kThreads>::first();
    const auto wanted = [&](int, int later) { return (mine >> later & 1) != 0; };
    start_rows<DIM, kKeys, kThreads>(Shape::kKey + stage * Layout::bytes(kKeys), p.key, key, tile * kKeys, wanted);
    start_rows<DIM, kKeys, kThreads>(Shape::kValue + stage * Layout::bytes(kKeys), p.value, value, tile * kKeys, wanted);
  };
  const auto following = [&](int tile) {
    while (tile < tiles && visible(tile) == 0) ++tile;
    return tile;
  };

  const int row = warp_index() * 16;
  OnlineSoftmax softmax;
  float out[DIM / 8][4];
  clear(out);
  int tile = following(0), stage = 0;
  if (tile < tiles) start_tile(tile, 0);
  copy_commit();
  while (tile < tiles) {
    const int next = following(tile + 1);
    if (next < tiles) start_tile(next, stage ^ 1);
    copy_commit();
    copy_wait<1>();
    block_barrier();

    float scores[kKeys / 8][4];
    clear(scores);
    const Shared keys = Shape::kKey + stage * Layout::bytes(kKeys), values = Shape::kValue + stage * Layout::bytes(kKeys);
    multiply<T, DIM>(
        scores, [&](uint32_t(&a)[4], int k) { load_a<DIM>(a, Shape::kQuery, row, k); },
        [&](uint32_t(&b)[4], int k, int n) { load_b_transposed<DIM>(b, keys, k, n); });
    hide(scores, p.scale * kLog2E, visible(tile));
    softmax.update(scores, out);
    multiply<T, kKeys>(
        out, [&](uint32_t(&a)[4], int k) { as_a<T>(a, scores, k / 8); },
        [&](uint32_t(&b)[4], int k, int n) { load_b<DIM>(b, values, k, n); });
    block_barrier();  // the next round writes over this stage
    tile = next;
    stage ^= 1;
  }
  copy_wait<0>();

  float factor[2], lse[2];
  softmax.finish(factor, lse);
  const Places out_places = row_places(p, g, p.out_stride, head), lse_places = row_places(p, g, p.lse_stride, head);
  uint16_t* to[2];
  bool wanted[2];
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int i = first_row + row + lane_index() / 4 + 8 * half;
    wanted[half] = i < g.rows;
    to[half] = p.out + out_places.at(i);
    if (wanted[half] && lane_index() % 4 == 0) p.lse[lse_places.at(i)] = lse[half];
  }
  store_rows<T>(out, factor, to, wanted);
}

}  // namespace sm80
}  // namespace retro_kernels
