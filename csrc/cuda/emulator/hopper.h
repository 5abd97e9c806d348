// The functions of sm90/hopper.cuh for the emulator: mbarriers, the copy engine and wgmma, from the PTX ISA.
//
// All that is asynchronous is late: a box lands, and one is read to be stored, when the scheduler comes to it between
// turns or where the thread waits for it; a product is made where its thread waits for it. Until then what it writes is
// NaN.
#pragma once
#include "emulator.h"
#include "tensor_map.h"

namespace retro_kernels {
namespace sm90 {

// ---- mbarriers, in their eight bytes
struct EmulatedBarrier {
  uint8_t mark, phase, arrivals, missing;  // `missing` of `arrivals` in this phase
  int32_t bytes;                           // that this phase still waits for
};

constexpr uint8_t kBarrierMark = 0x5b, kUnfenced = 0x5a;

inline EmulatedBarrier& emulated(Shared b) {
  auto& barrier = *reinterpret_cast<EmulatedBarrier*>(emulator::current()->shared(b, 8, 8));
  if (barrier.mark != kBarrierMark && barrier.mark != kUnfenced)
    throw emulator::Fault("an mbarrier is used that was not initialised");
  return barrier;
}
// By the copy engine, or another block.
inline EmulatedBarrier& emulated_from_outside(Shared b) {
  EmulatedBarrier& barrier = emulated(b);
  if (barrier.mark != kBarrierMark)
    throw emulator::Fault("an mbarrier is used by the copy engine or another block without a fence.mbarrier_init after it");
  return barrier;
}

inline void init_barrier(Shared b, int arrivals) {
  *reinterpret_cast<EmulatedBarrier*>(emulator::current()->shared(b, 8, 8)) = {
      kUnfenced, 0, static_cast<uint8_t>(arrivals), static_cast<uint8_t>(arrivals), 0};
  emulator::current()->running().barriers.push_back(b);
}

inline void fence_barriers(const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
  if (emulator::skipped(file, line)) return;
  auto& made = emulator::current()->running().barriers;
  for (const Shared b : made) emulated(b).mark = kBarrierMark;
  made.clear();
}
inline void fence_async(const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
  if (!emulator::skipped(file, line)) emulator::current()->fence();
}

inline void end_phase_if_complete(EmulatedBarrier& barrier) {
  emulator::current()->made_progress();
  if (barrier.missing > 0 || barrier.bytes != 0) return;
  barrier.phase ^= 1;
  barrier.missing = barrier.arrivals;
}

inline void arrive_expecting(Shared b, int bytes) {
  EmulatedBarrier& barrier = emulated(b);
  if (barrier.missing == 0) throw emulator::Fault("more arrivals at an mbarrier than its phase has");
  --barrier.missing;
  barrier.bytes += bytes;
  end_phase_if_complete(barrier);
}
inline void arrive(Shared b) { arrive_expecting(b, 0); }

// ---- clusters
inline emulator::Block* peer(int rank) {
  emulator::Block* block = emulator::current()->cluster->blocks.at(rank);
  if (block->ended()) throw emulator::Fault("shared memory is reached of a block that has ended");
  return block;
}
inline void arrive_at(Shared b, int rank) {
  emulator::as(peer(rank), [=] {
    emulated_from_outside(b);
    arrive(b);
  });
  emulator::current()->made_progress();
}
inline void cluster_barrier() {
  emulator::Block* block = emulator::current();
  block->meet(block->cluster->barrier, block->threads * static_cast<int>(block->cluster->blocks.size()));
}

inline void wait(Shared b, int parity) {
  emulator::current()->wait([=] { return emulated(b).phase != parity; });
}

// ---- the copy engine
inline uint32_t swizzled_address(uint32_t address) { return address ^ (((address >> 7) & 7) << 4); }

// Calls move(element of the tensor or null beyond its ends, element in shared memory) for every element of a box.
template <class Move>
void for_box(const emulator::TensorMap& map, Shared at, const int (&first)[5], Move move) {
  if (at % 1024) throw emulator::Fault("a swizzled box must be aligned to 1024 bytes in shared memory");
  int place[5] = {};
  for (uint32_t i = 0;; ++i) {
    char* element = map.data;
    for (int axis = 0; axis < 5; ++axis) {
      const int64_t x = first[axis] + static_cast<int64_t>(place[axis]);
      if (element) element = x >= 0 && x < map.size[axis] ? element + x * map.stride[axis] : nullptr;
    }
    move(reinterpret_cast<uint16_t*>(element),
         reinterpret_cast<uint16_t*>(emulator::current()->other_proxy(swizzled_address(at + 2 * i), 2, 2)));
    int axis = 0;
    while (axis < 5 && ++place[axis] == map.box[axis]) place[axis++] = 0;
    if (axis == 5) return;
  }
}

inline int box_bytes(const emulator::TensorMap& map) {
  return 2 * map.box[0] * map.box[1] * map.box[2] * map.box[3] * map.box[4];
}

inline void load_box(const emulator::TensorMap& map, Shared to, Shared b, int c0, int c1, int c2, int c3, int c4) {
  const int first[5] = {c0, c1, c2, c3, c4};
  std::memset(emulator::current()->other_proxy(to, box_bytes(map), 1024), 0xff, box_bytes(map));
  emulator::current()->engine.push_back({-1, [&map, to, b, first] {
    for_box(map, to, first, [](const uint16_t* from, uint16_t* at) { *at = from ? *from : 0; });
    EmulatedBarrier& barrier = emulated_from_outside(b);
    barrier.bytes -= box_bytes(map);
    end_phase_if_complete(barrier);
  }});
}

// Into the same place of every block of `ranks`, each of whose barriers hears of its bytes.
inline void load_box_into(const emulator::TensorMap& map, Shared to, Shared b, int ranks, int c0, int c1, int c2,
                          int c3, int c4) {
  for (int rank = 0; ranks >> rank; ++rank)
    if (ranks >> rank & 1) {
      emulator::Block* block = peer(rank);
      std::memset(block->other_proxy(to, box_bytes(map), 1024), 0xff, box_bytes(map));
    }
  const int first[5] = {c0, c1, c2, c3, c4};
  emulator::current()->engine.push_back({-1, [&map, to, b, ranks, first] {
    for (int rank = 0; ranks >> rank; ++rank)
      if (ranks >> rank & 1)
        emulator::as(peer(rank), [&] {
          for_box(map, to, first, [](const uint16_t* from, uint16_t* at) { *at = from ? *from : 0; });
          EmulatedBarrier& barrier = emulated_from_outside(b);
          barrier.bytes -= box_bytes(map);
          end_phase_if_complete(barrier);
        });
  }});
}

inline void store_box(const emulator::TensorMap& map, Shared from, int c0, int c1, int c2, int c3, int c4) {
  const int first[5] = {c0, c1, c2, c3, c4};
  emulator::current()->other_proxy(from, box_bytes(map), 1024);  // now: a fence after this comes too late
  emulator::current()->engine.push_back({thread_index(), [&map, from, first] {
    for_box(map, from, first, [](uint16_t* to, const uint16_t* at) {
      if (to) *to = *at;
    });
  }});
}

inline void wait_for_stores() {
  auto& engine = emulator::current()->engine;
  for (auto request = engine.begin(); request != engine.end();) {
    if (request->thread == thread_index()) {
      request->move();
      request = engine.erase(request);
    } else {
      ++request;
    }
  }
}

// ---- warpgroups
template <int kRegisters>
void take_registers() {
  static_assert(kRegisters >= 24 && kRegisters <= 256 && kRegisters % 8 == 0, "what setmaxnreg takes");
}
template <int kRegisters>
void give_registers() {
  take_registers<kRegisters>();
}

template <int kCount>
void settle(float (&)[kCount]) {}
inline void fence_products(const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
  if (!emulator::skipped(file, line)) emulator::current()->running().products_fenced = true;
}

inline uint32_t shared_address(Shared at) { return at; }

// Element (row, k) of a matrix whose rows lie along the sum, and (k, column) of one whose columns are adjacent, by the
// descriptor's fields: start address, leading and stride byte offsets, and the 128-byte swizzle, which is on addresses.
inline uint16_t described(uint64_t descriptor, int along, int k, bool columns) {
  const auto field = [&](int shift) { return static_cast<uint32_t>(descriptor >> shift & 0x3fff) << 4; };
  if (descriptor >> 62 != 1) throw emulator::Fault("a descriptor without the 128-byte swizzle");
  const uint32_t start = field(0), leading = field(16), stride = field(32);
  const uint32_t at = columns ? start + along / 64 * leading + along % 64 * 2 + k / 8 * stride + k % 8 * 128
                              : start + along / 8 * stride + along % 8 * 128 + 2 * k;
  return *reinterpret_cast<uint16_t*>(emulator::current()->other_proxy(swizzled_address(at), 2, 2));
}

// Puts off `rows(r, k)`, of this thread's two rows, times b; the sum is NaN until it is waited for.
template <class T, int kCount, class Rows>
void put_off(T type, float (&sum)[kCount], Rows rows, uint64_t b, bool columns, bool accumulate) {
  if (!emulator::current()->running().products_fenced)
    throw emulator::Fault("wgmma without a wgmma.fence since its registers were touched");
  auto& products = emulator::current()->running().products;
  auto kept = std::make_shared<std::vector<float>>(sum, sum + kCount);
  bool first = true;
  for (const auto& product : products) first = first && product.sum != sum;
  std::fill(sum, sum + kCount, NAN);
  products.push_back({sum, [=, &sum] {
    if (first) std::copy(kept->begin(), kept->end(), sum);
    for (int i = 0; i < kCount; ++i) {
      const int row = i / 2 % 2, column = i / 4 * 8 + lane_index() % 4 * 2 + i % 2;
      float total = accumulate ? sum[i] : 0.0f;
      for (int k = 0; k < 16; ++k)
        total += rows(row, k) * emulator::widen(type, described(b, column, k, columns));
      sum[i] = total;
    }
  }});
}

template <int... kCounts>
void wait_for_products(float (&... sums)[kCounts]) {
  emulator::current()->collective("wgmma.wait_group", nullptr, [](void**) {});
  auto& products = emulator::current()->running().products;
  for (const auto& product : products) product.multiply();
  products.clear();
  emulator::current()->running().products_fenced = false;
}

template <class T, int kCount>
void multiply(T type, float (&sum)[kCount], uint64_t a, uint64_t b, bool a_columns, bool columns, int accumulate) {
  emulator::current()->collective("wgmma", nullptr, [](void**) {});
  const int first = warp_index() % 4 * 16 + lane_index() / 4;
  const auto rows = [=](int row, int k) { return emulator::widen(type, described(a, first + 8 * row, k, a_columns)); };
  put_off(type, sum, rows, b, columns, accumulate != 0);
}

template <class T, int kCount>
void add(T type, float (&sum)[kCount], const uint32_t (&a)[4], uint64_t b, bool columns) {
  struct Lane {
    const uint32_t* mine;
    float rows[2][16];
  } lane{a, {}};
  emulator::current()->collective("wgmma with registers", &lane, [type](void** lanes) {
    for (int i = 0; i < 32; ++i)
      for (int row = 0; row < 2; ++row)
        for (int k = 0; k < 16; ++k) {  // register j: row j % 2, columns 8 (j / 2) + 2 (lane % 4) + {0, 1}
          const uint32_t pair = static_cast<Lane*>(lanes[i / 4 * 4 + k % 8 / 2])->mine[row + k / 8 * 2];
          static_cast<Lane*>(lanes[i])->rows[row][k] = emulator::widen(type, static_cast<uint16_t>(pair >> k % 2 * 16));
        }
  });
  put_off(type, sum, [lane](int row, int k) { return lane.rows[row][k]; }, b, columns, true);
}

template <class T, int kCount>
void multiply_rows(T type, float (&sum)[kCount], uint64_t a, uint64_t b, int accumulate) {
  multiply(type, sum, a, b, false, false, accumulate);
}
template <class T, int kCount>
void multiply_columns(T type, float (&sum)[kCount], uint64_t a, uint64_t b, int accumulate) {
  multiply(type, sum, a, b, false, true, accumulate);
}
template <class T, int kCount>
void multiply_transposed(T type, float (&sum)[kCount], uint64_t a, uint64_t b, int accumulate) {
  multiply(type, sum, a, b, true, true, accumulate);
}
template <class T, int kCount>
void add_rows(T type, float (&sum)[kCount], const uint32_t (&a)[4], uint64_t b) {
  add(type, sum, a, b, false);
}
template <class T, int kCount>
void add_columns(T type, float (&sum)[kCount], const uint32_t (&a)[4], uint64_t b) {
  add(type, sum, a, b, true);
}

}  // namespace sm90
}  // namespace retro_kernels
