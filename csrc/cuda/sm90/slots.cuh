// Slots of a group in tiles of 64, none of which crosses from one neighbour to the next.
#pragma once
#include "rows.cuh"

namespace retro_kernels {
namespace sm90 {

constexpr int kSlots = 64;  // of a tile

RK_DEVICE int tiles_of_neighbour(const Problem& p) { return (p.retrieved + kSlots - 1) / kSlots; }

// `own`: the neighbour that the group's rows are of (kNeighbour).
RK_DEVICE int neighbour_of_tile(const Problem& p, int own, int tile) {
  return p.grouping == kClock ? tile / tiles_of_neighbour(p) : p.grouping == kNeighbour ? own : 0;
}
RK_DEVICE int first_slot(const Problem& p, int tile) { return tile % tiles_of_neighbour(p) * kSlots; }

// The mask of a tile's 64 slots, two to a lane: read while the tile before is computed, as memory is far.
struct MaskAhead {
  uint8_t seen[2] = {};

  RK_DEVICE void read(const Problem& p, int batch, int chunk, int own, int tile) {
    if (!p.mask) return;
    const uint8_t* mask = p.mask + batch * p.mask_stride.batch + chunk * p.mask_stride.chunk +
                          neighbour_of_tile(p, own, tile) * p.mask_stride.neighbour;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int slot = first_slot(p, tile) + 32 * half + lane_index();
      seen[half] = slot < p.retrieved ? mask[slot * p.mask_stride.token] : 0;
    }
  }
};

// Which of a tile's 64 slots are visible, the same in every thread, and which are there and hidden.
struct Visible {
  uint64_t slots, hidden;
};
RK_DEVICE Visible visible_slots(const Problem& p, int tile, const MaskAhead& mask) {
  const int there = p.retrieved - first_slot(p, tile);
  const uint64_t all = there < kSlots ? (uint64_t{1} << there) - 1 : ~uint64_t{0};
  if (!p.mask) return {all, 0};
  uint64_t seen = 0;
#pragma unroll
  for (int half = 0; half < 2; ++half) seen |= static_cast<uint64_t>(ballot(mask.seen[half] != 0)) << (32 * half);
  return {seen, all & ~seen};
}

// A masked number may be NaN, and 0 times NaN is NaN: hidden rows of a tile become 0. For `kThreads` threads, of which
// this is `thread`, that share a barrier.
template <int kDim, int kThreads>
RK_DEVICE void clear_hidden(Shared tile, uint64_t hidden, int thread, int barrier) {
  if (hidden == 0) return;  // the same in all of them
  for (int i = thread; i < kSlots * kDim / 8; i += kThreads) {  // 16 bytes each
    const int row = i / (kDim / 8), part = i % (kDim / 8);
    if (hidden >> row & 1)
      *shared_pointer<Vector16>(tile + part / 8 * kPanel + row * kPanelRow + part % 8 * 16) = Vector16{};
  }
  fence_async();
  named_barrier(barrier, kThreads);
}

}  // namespace sm90
}  // namespace retro_kernels
