// Kernels with one fault each, to see that the emulator finds it; and products that are right. Ends with 0 when all is
// as it should be, otherwise says what is not.
#include <cstdio>
#include <functional>
#include <string>

#include "common/tile.cuh"
#include "sm90/rows.cuh"

using namespace retro_kernels;

namespace {

int failures = 0;

void expect(bool right, const char* what) {
  if (right) return;
  std::printf("not as expected: %s\n", what);
  ++failures;
}

std::string fault(int threads, size_t bytes, const std::function<void()>& kernel, int cluster = 1) {
  try {
    emulator::launch(cluster, threads, bytes, kernel, cluster);
  } catch (const emulator::Fault& found) {
    return found.what();
  }
  return "";
}

bool contains(const std::string& text, const char* part) { return text.find(part) != std::string::npos; }

void faults() {
  alignas(16) static uint32_t numbers[4] = {1, 2, 3, 4};
  uint32_t read = 0;
  emulator::launch(1, 32, 1024, [&] {
    copy_async(lane_index() * 16, numbers, true);
    copy_commit();
    if (lane_index() == 0) read = *shared_pointer<const uint32_t>(0);  // no wait
    copy_wait<0>();
  });
  expect(read == 0xffffffffu, "what is read before the wait is NaN");
  emulator::launch(1, 32, 1024, [&] {
    copy_async(lane_index() * 16, numbers, lane_index() != 0);
    copy_commit();
    copy_wait<0>();
    warp_barrier();
    if (lane_index() == 0) read = *shared_pointer<const uint32_t>(0) + *shared_pointer<const uint32_t>(16);
  });
  expect(read == 1, "a copy that is not valid brings zeros, another its numbers");

  expect(contains(fault(64, 1024, [] { if (warp_index() == 0) block_barrier(); }), "deadlock"), "a deadlock is seen");
  expect(contains(fault(32, 64, [] { *shared_pointer<uint64_t>(64) = 0; }), "accessed at 64"), "an address beyond is seen");
  expect(contains(fault(32, 64, [] { shared_pointer<uint64_t>(56)[1] = 0; }), "beside"), "a write beside is seen");
  expect(contains(fault(32, 64, [] { copy_async(0, numbers, true); }), "under way"), "a copy left under way is seen");
  expect(contains(fault(32, 64, [] { copy_async(0, reinterpret_cast<char*>(numbers) + 4, true); }), "aligned"),
         "a source that is not aligned is seen");
  expect(contains(fault(32, 64, [] { lane_index() % 2 ? warp_barrier() : static_cast<void>(ballot(true)); }), "meet"),
         "lanes in different instructions are seen");

  // Warp 1 reads what warp 0 writes, without a barrier and with one.
  for (const bool barrier : {false, true}) {
    int wrong = 0;
    for (uint64_t seed = 1; seed <= 20; ++seed) {
      setenv("RETRO_KERNELS_EMULATOR_SEED", std::to_string(seed).c_str(), 1);
      emulator::launch(1, 64, 256, [&] {
        if (warp_index() == 0) *shared_pointer<uint32_t>(4 * lane_index()) = lane_index();
        if (barrier) block_barrier();
        if (warp_index() == 1 && *shared_pointer<const uint32_t>(4 * lane_index()) != static_cast<uint32_t>(lane_index())) ++wrong;
      });
    }
    expect((wrong > 0) != barrier, barrier ? "with a barrier all is right" : "a missing barrier is seen");
  }
  unsetenv("RETRO_KERNELS_EMULATOR_SEED");
}

// a [16 x 32] b [32 x 16] of small integers, with each operand from a tile as it is and from its transpose.
template <class T, int COLUMNS>
void product(const char* what) {
  const auto left = [](int y, int k) { return static_cast<float>((3 * y + 5 * k) % 7 - 3); };
  const auto right = [](int k, int x) { return static_cast<float>((2 * k + x) % 5 - 2); };
  using Layout = TileLayout<COLUMNS>;
  const Shared a_tile = 0, at_tile = Layout::bytes(32), b_tile = 2 * Layout::bytes(32), bt_tile = 3 * Layout::bytes(32);
  bool same = true;
  emulator::launch(1, 32, 4 * Layout::bytes(32), [&] {
    const auto put = [](Shared tile, int row, int column, float x) {
      *shared_pointer<uint16_t>(Layout::pair(tile, row, column / 2 * 2) + column % 2 * 2) = emulator::narrow(T(), x);
    };
    if (lane_index() == 0)
      for (int i = 0; i < 32; ++i)
        for (int j = 0; j < 32; ++j) {
          put(a_tile, i, j, i < 16 ? left(i, j) : 0), put(at_tile, i, j, j < 16 ? left(j, i) : 0);
          put(b_tile, i, j, right(i, j)), put(bt_tile, i, j, right(j, i));
        }
    warp_barrier();
    for (int way = 0; way < 4; ++way) {
      float c[2][4];
      clear(c);
      multiply<T, 32>(
          c,
          [&](uint32_t(&a)[4], int k) {
            way & 1 ? load_a_transposed<COLUMNS>(a, at_tile, 0, k) : load_a<COLUMNS>(a, a_tile, 0, k);
          },
          [&](uint32_t(&b)[4], int k, int n) {
            way & 2 ? load_b_transposed<COLUMNS>(b, bt_tile, k, n) : load_b<COLUMNS>(b, b_tile, k, n);
          });
      for (int n = 0; n < 2; ++n)
        for (int e = 0; e < 4; ++e) {
          const int y = lane_index() / 4 + e / 2 * 8, x = 8 * n + lane_index() % 4 * 2 + e % 2;
          float sum = 0;
          for (int k = 0; k < 32; ++k) sum += left(y, k) * right(k, x);
          same = same && sum == c[n][e];
        }
    }
  });
  expect(same, what);
}

// A tensor of small integers, [row][column], rows of 72 numbers of which 70 are there.
struct Numbers {
  uint16_t data[72 * 72];
  emulator::TensorMap map;

  explicit Numbers(int rows, int box_rows) {
    for (int i = 0; i < 72 * 72; ++i) data[i] = emulator::narrow(Float16(), value(i / 72, i % 72));
    map = {reinterpret_cast<char*>(data), {70, 1, rows, 1, 1}, {2, 144, 144, 10368, 10368}, {64, 1, box_rows, 1, 1}};
  }
  static float value(int row, int column) { return static_cast<float>((3 * row + 5 * column) % 7 - 3); }
};

constexpr Shared kBarrier = 3 * sm90::kPanel;
constexpr size_t kHopperBytes = kBarrier + 64;

void hopper_faults() {
  Numbers numbers(70, 64);
  uint16_t early = 0, late = 0, beyond = 0;
  emulator::launch(1, 32, kHopperBytes, [&] {
    if (lane_index() != 0) return;
    sm90::init_barrier(kBarrier, 1);
    sm90::fence_barriers();
    sm90::arrive_expecting(kBarrier, sm90::kPanel);
    sm90::load_box(numbers.map, 0, kBarrier, 16, 0, 8, 0, 0);
    early = *shared_pointer<const uint16_t>(sm90::swizzled(3, 0));  // no wait
    sm90::wait(kBarrier, 0);
    late = *shared_pointer<const uint16_t>(sm90::swizzled(3, 32) + 2);      // row 11, column 33
    beyond = *shared_pointer<const uint16_t>(sm90::swizzled(3, 112) + 14);  // column 79
  });
  expect(early == 0xffff, "what is read before the box has landed is NaN");
  expect(late == emulator::narrow(Float16(), Numbers::value(11, 33)), "a box is where the swizzle says");
  expect(beyond == 0, "a box is zero beyond the tensor");

  expect(contains(fault(32, kHopperBytes, [] { sm90::wait(kBarrier, 0); }), "not initialised"), "a barrier must be made");
  expect(contains(fault(32, kHopperBytes, [] {
           if (lane_index() != 0) return;
           sm90::init_barrier(kBarrier, 1);
           sm90::arrive_expecting(kBarrier, 16);  // nothing comes
           sm90::wait(kBarrier, 0);
         }), "deadlock"), "bytes that never come are seen");
  expect(contains(fault(32, kHopperBytes, [&] { sm90::load_box(numbers.map, 128, kBarrier, 0, 0, 0, 0, 0); }), "aligned"),
         "a box in the middle of a swizzled block is seen");

  for (const bool waits : {false, true}) {
    Numbers target(70, 64);
    emulator::launch(1, 32, kHopperBytes, [&] {
      if (lane_index() != 0) return;
      std::memset(emulator::current()->shared(0, sm90::kPanel, 1), 0, sm90::kPanel);
      sm90::store_box(target.map, 0, 0, 0, 0, 0, 0);
      if (waits) sm90::wait_for_stores();
      std::memset(emulator::current()->shared(0, sm90::kPanel, 1), 0x11, sm90::kPanel);
    });
    expect((target.data[0] == 0) == waits, "what is stored may not be overwritten before the copy engine has read it");
    expect(target.data[65] == emulator::narrow(Float16(), Numbers::value(0, 65)), "a box ends where it ends");
  }
}

// Two blocks, the first of which loads one box into both.
void clusters() {
  Numbers numbers(70, 64);
  uint16_t early[2] = {}, late[2] = {};
  const auto share = [&](bool starts_together, bool ends_together) {
    return [&, starts_together, ends_together] {
      const int rank = static_cast<int>(block_index());
      if (lane_index() == 0) {
        sm90::init_barrier(kBarrier, 1);
        sm90::init_barrier(kBarrier + 8, 2);
        sm90::fence_barriers();
      }
      if (starts_together) sm90::cluster_barrier();
      if (lane_index() == 0) {
        sm90::arrive_expecting(kBarrier, sm90::kPanel);
        if (rank == 0) sm90::load_box_into(numbers.map, 0, kBarrier, 3, 0, 0, 8, 0, 0);
        early[rank] = *shared_pointer<const uint16_t>(sm90::swizzled(3, 0));
        sm90::wait(kBarrier, 0);
        late[rank] = *shared_pointer<const uint16_t>(sm90::swizzled(3, 32) + 2);  // row 11, column 17
        for (int peer = 0; peer < 2; ++peer) sm90::arrive_at(kBarrier + 8, peer);
        if (rank == 1) sm90::wait(kBarrier + 8, 0);
      }
      if (ends_together) sm90::cluster_barrier();
    };
  };
  bool found_start = false, found_end = false, right = true;
  for (uint64_t seed = 0; seed <= 20; ++seed) {
    setenv("RETRO_KERNELS_EMULATOR_SEED", std::to_string(seed).c_str(), 1);
    right = right && fault(32, kHopperBytes, share(true, true), 2).empty();
    for (const uint16_t x : late) right = right && x == emulator::narrow(Float16(), Numbers::value(11, 17));
    if (seed == 0) right = right && early[0] == 0xffff;
    found_start = found_start || contains(fault(32, kHopperBytes, share(false, true), 2), "not initialised");
    found_end = found_end || contains(fault(32, kHopperBytes, share(true, false), 2), "has ended");
  }
  unsetenv("RETRO_KERNELS_EMULATOR_SEED");
  expect(right, "a box lands in both blocks of a cluster, and both barriers hear of it");
  expect(found_start, "a block that reaches a barrier which another has not made yet is seen");
  expect(found_end, "a block that reaches one that has ended is seen");
}

// Products of 64 x 64 from boxes of 64 x 64, by every way of reading the right factor and the left one.
void hopper_products() {
  Numbers numbers(70, 64);
  bool same = true, hidden = true;
  emulator::launch(1, 128, kHopperBytes, [&] {
    using namespace sm90;
    if (thread_index() == 0) {
      init_barrier(kBarrier, 1);
      fence_barriers();
      arrive_expecting(kBarrier, 2 * kPanel);
      load_box(numbers.map, 0, kBarrier, 0, 0, 0, 0, 0);
      load_box(numbers.map, kPanel, kBarrier, 3, 0, 5, 0, 0);
    }
    block_barrier();
    wait(kBarrier, 0);
    const auto a = [](int row, int k) { return Numbers::value(row, k); };
    const auto b = [](int row, int column) {
      return row + 5 < 70 && column + 3 < 70 ? Numbers::value(row + 5, column + 3) : 0.0f;
    };
    float turned[32];
    fence_products();
    for (int k = 0; k < 4; ++k)
      multiply_transposed(Float16(), turned, columns_descriptor(2 * k * kBlock, 0),
                          columns_descriptor(kPanel + 2 * k * kBlock, 0), k > 0);
    wait_for_products(turned);
    for (int i = 0; i < 32; ++i) {
      const int row = warp_index() * 16 + lane_index() / 4 + i / 2 % 2 * 8, column = i / 4 * 8 + lane_index() % 4 * 2 + i % 2;
      float sum = 0.0f;
      for (int k = 0; k < 64; ++k) sum += a(k, row) * b(k, column);
      same = same && sum == turned[i];
    }
    for (const bool columns : {false, true}) {
      float direct[32], held[32] = {};
      fence_products();
      for (int k = 0; k < 4; ++k) {
        const uint64_t left = rows_descriptor(k * 32);
        const uint64_t right = columns ? columns_descriptor(kPanel + 2 * k * kBlock, 0) : rows_descriptor(kPanel + k * 32);
        uint32_t registers[4];
        for (int j = 0; j < 4; ++j) {
          const int row = warp_index() * 16 + lane_index() / 4 + j % 2 * 8, at = 16 * k + j / 2 * 8 + lane_index() % 4 * 2;
          registers[j] = pack(Float16(), a(row, at), a(row, at + 1));
        }
        columns ? multiply_columns(Float16(), direct, left, right, k > 0) : multiply_rows(Float16(), direct, left, right, k > 0);
        columns ? add_columns(Float16(), held, registers, right) : add_rows(Float16(), held, registers, right);
      }
      hidden = hidden && direct[0] != direct[0] && held[0] != held[0];
      wait_for_products(direct, held);
      for (int i = 0; i < 32; ++i) {
        const int row = warp_index() * 16 + lane_index() / 4 + i / 2 % 2 * 8, column = i / 4 * 8 + lane_index() % 4 * 2 + i % 2;
        float sum = 0.0f;
        for (int k = 0; k < 64; ++k) sum += a(row, k) * (columns ? b(k, column) : b(column, k));
        same = same && sum == direct[i] && sum == held[i];
      }
    }
  });
  expect(hidden, "a product that is not waited for is NaN");
  expect(same, "wgmma's products by rows and by columns, from shared memory and from registers");
}

// A tile that threads write by ordinary stores and wgmma or the copy engine then reads, or fills anew.
void proxies() {
  using namespace sm90;
  enum Way { kNoFence, kOwnFence, kAnotherFence };
  Numbers numbers(70, 64);
  const auto tile = [&](Way way, int use) {
    return [&numbers, way, use] {
      if (thread_index() == 0) {
        init_barrier(kBarrier, 1);
        fence_barriers();
      }
      if (thread_index() == 1) *shared_pointer<uint32_t>(swizzled(2, 0)) = 0;
      if (way == kOwnFence || (way == kAnotherFence && thread_index() == 2)) fence_async();
      block_barrier();
      if (use == 0) {
        float sum[32] = {};
        fence_products();
        multiply_rows(Float16(), sum, rows_descriptor(0), rows_descriptor(kPanel), 0);
        wait_for_products(sum);
      } else if (thread_index() == 0 && use == 1) {
        store_box(numbers.map, 0, 0, 0, 0, 0, 0);
        wait_for_stores();
      } else if (thread_index() == 0) {
        arrive_expecting(kBarrier, kPanel);
        load_box(numbers.map, 0, kBarrier, 0, 0, 0, 0, 0);
        wait(kBarrier, 0);
      }
    };
  };
  for (int use = 0; use < 3; ++use) {
    expect(contains(fault(128, kHopperBytes, tile(kNoFence, use)), "without a fence.proxy.async"),
           "bytes that no fence follows are seen");
    expect(contains(fault(128, kHopperBytes, tile(kAnotherFence, use)), "thread 1 wrote"),
           "another thread's fence does not do for the writer's");
    expect(fault(128, kHopperBytes, tile(kOwnFence, use)).empty(), "the writer's fence does");
  }
  expect(contains(fault(32, kHopperBytes, [&] {
           if (lane_index() != 0) return;
           init_barrier(kBarrier, 1);
           arrive_expecting(kBarrier, kPanel);
           load_box(numbers.map, 0, kBarrier, 0, 0, 0, 0, 0);
           wait(kBarrier, 0);
         }), "fence.mbarrier_init"), "a barrier that no fence follows is seen where the copy engine comes to it");
  expect(contains(fault(128, kHopperBytes, [] {
           float sum[32] = {};
           multiply_rows(Float16(), sum, rows_descriptor(0), rows_descriptor(kPanel), 0);
           wait_for_products(sum);
         }), "wgmma.fence"), "a product that no fence comes before is seen");
}

// What CuTe's make_gmma_desc makes (nvidia-cutlass 4.2.0, Layout_K_SW128_Atom and Layout_MN_SW128_Atom of bfloat16): of
// 64 x 16 numbers that lie along the sum, of 64 x 16 and 128 x 16 across it, the latter in panels of 64 x 64; and how
// many bytes its layouts have from 16 numbers of the sum to the next.
void descriptors() {
  using namespace sm90;
  bool same = true;
  emulator::launch(1, 32, kHopperBytes, [&] {
    if (lane_index() != 0) return;
    same = same && rows_descriptor(0) == 0x4000004000010000u;
    same = same && columns_descriptor(0, 0) == 0x4000004000000000u;
    same = same && columns_descriptor(0, kPanel) == 0x4000004002000000u;
    same = same && rows_descriptor(32) - rows_descriptor(0) == 32 >> 4;
    same = same && columns_descriptor(2 * kBlock, 0) - columns_descriptor(0, 0) == 2048 >> 4;
    same = same && rows_descriptor(227 << 10) == rows_descriptor(0) + (227 << 10 >> 4);
  });
  expect(same, "descriptors of wgmma as CuTe makes them");
}

void divisions() {
  bool same = true;
  for (const int64_t by : {1, 2, 3, 5, 7, 8, 63, 64, 65, 100, 127, 128, 129, 1000, 32767, 32768, 65537, 715827883, INT32_MAX})
    for (const int64_t near : {int64_t{0}, by, 2 * by, 1000 * by, INT32_MAX / by * by, int64_t{INT32_MAX}})
      for (int64_t i = std::max<int64_t>(near - 2, 0); i <= std::min<int64_t>(near + 2, INT32_MAX); ++i)
        same = same && divide(static_cast<int>(i), divisor(static_cast<int>(by))) == i / by;
  expect(same, "divisions by multiplication");
  expect(divide(INT32_MAX, Divisor()) == 0, "a divisor that is not given makes quotients of 0");
}

void numbers() {
  for (int bits = 0; bits < 1 << 16; ++bits) {
    const float x = emulator::widen(Float16(), static_cast<uint16_t>(bits));
    if (x == x && emulator::narrow(Float16(), x) != bits) return expect(false, "float16 there and back");
    const float y = emulator::widen(BFloat16(), static_cast<uint16_t>(bits));
    if (y == y && emulator::narrow(BFloat16(), y) != bits) return expect(false, "bfloat16 there and back");
  }
  expect(emulator::narrow(Float16(), 1.0f + 0x1p-11f) == 0x3c00, "float16 rounds ties to even");
  expect(emulator::narrow(Float16(), 1.0f + 0x3p-11f) == 0x3c02, "float16 rounds ties to even, upwards");
  expect(emulator::narrow(Float16(), 65520.0f) == 0x7c00, "float16 overflows to infinity");
  expect(emulator::narrow(Float16(), 65519.0f) == 0x7bff, "float16's largest number");
  expect(emulator::narrow(Float16(), 0x1p-25f) == 0, "float16's smallest half rounds to zero");
  expect(emulator::narrow(BFloat16(), 1.0f + 0x1p-8f) == 0x3f80, "bfloat16 rounds ties to even");
}

}  // namespace

int main() {
  faults();
  product<BFloat16, 64>("bfloat16 products, chunks exchanged");
  product<Float16, 96>("float16 products, rows padded");
  product<BFloat16, 32>("bfloat16 products, short rows");
  numbers();
  divisions();
  hopper_faults();
  clusters();
  hopper_products();
  proxies();
  descriptors();
  return failures ? 1 : 0;
}
