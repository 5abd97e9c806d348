// Hopper's own instructions (PTX ISA, sm_90a), one function each. emulator/hopper.h has the same functions for the host.
#pragma once
#include "../common/numbers.cuh"
#include "problem.h"

#if !defined(__CUDACC__)
#include "../emulator/hopper.h"
#else

namespace retro_kernels {
namespace sm90 {

// ---- mbarriers. A phase ends when all its arrivals and all its bytes have come.
RK_DEVICE void init_barrier(Shared b, int arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(b)), "r"(arrivals) : "memory");
}
// Makes initialised barriers visible to the copy engine.
RK_DEVICE void fence_barriers() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }
RK_DEVICE void arrive(Shared b) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(b)) : "memory");
}
RK_DEVICE void arrive_expecting(Shared b, int bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(b)), "r"(bytes) : "memory");
}
// Until the phase of this parity has ended.
RK_DEVICE void wait(Shared b, int parity) {
  uint32_t done = 0;
  while (!done)
    asm volatile(
        "{\n.reg .pred p;\nmbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;\nselp.u32 %0, 1, 0, p;\n}\n"
        : "=r"(done)
        : "r"(shared_address(b)), "r"(parity)
        : "memory");
}

// ---- clusters: adjacent blocks that run together and reach each other's shared memory at the same addresses
// At the barrier of the block of this rank. Nothing that this thread wrote is published with it: a release to the
// cluster would be a fence of all memory.
RK_DEVICE void arrive_at(Shared b, int rank) {
  asm volatile(
      "{\n.reg .b32 there;\nmapa.shared::cluster.u32 there, %0, %1;\n"
      "mbarrier.arrive.shared::cluster.b64 _, [there];\n}\n" ::"r"(shared_address(b)),
      "r"(rank)
      : "memory");
}
// Of all threads of all blocks.
RK_DEVICE void cluster_barrier() {
  asm volatile("barrier.cluster.arrive.release;\nbarrier.cluster.wait.acquire;" ::: "memory");
}

// ---- the copy engine, between global memory and a box of a tensor of five axes, swizzled by 128 bytes
RK_DEVICE void load_box(const TensorMap& map, Shared to, Shared b, int c0, int c1, int c2, int c3, int c4) {
  asm volatile(
      "cp.async.bulk.tensor.5d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4, %5, %6, %7}], "
      "[%2];" ::"r"(shared_address(to)),
      "l"(&map), "r"(shared_address(b)), "r"(c0), "r"(c1), "r"(c2), "r"(c3), "r"(c4)
      : "memory");
}
// Into the same place of every block of `ranks` (a bit each), each of whose barriers hears of its bytes.
RK_DEVICE void load_box_into(const TensorMap& map, Shared to, Shared b, int ranks, int c0, int c1, int c2, int c3,
                             int c4) {
  asm volatile(
      "cp.async.bulk.tensor.5d.shared::cluster.global.tile.mbarrier::complete_tx::bytes.multicast::cluster [%0], "
      "[%1, {%3, %4, %5, %6, %7}], [%2], %8;" ::"r"(shared_address(to)),
      "l"(&map), "r"(shared_address(b)), "r"(c0), "r"(c1), "r"(c2), "r"(c3), "r"(c4),
      "h"(static_cast<uint16_t>(ranks))
      : "memory");
}
RK_DEVICE void store_box(const TensorMap& map, Shared from, int c0, int c1, int c2, int c3, int c4) {
  asm volatile("cp.async.bulk.tensor.5d.global.shared::cta.tile.bulk_group [%0, {%2, %3, %4, %5, %6}], [%1];" ::"l"(&map),
               "r"(shared_address(from)), "r"(c0), "r"(c1), "r"(c2), "r"(c3), "r"(c4)
               : "memory");
}
// Until all stores of this thread have read shared memory.
RK_DEVICE void wait_for_stores() {
  asm volatile("cp.async.bulk.commit_group;\ncp.async.bulk.wait_group.read 0;" ::: "memory");
}
// What ordinary stores wrote to shared memory becomes visible to the copy engine and to wgmma.
RK_DEVICE void fence_async() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

// ---- warpgroups
template <int kRegisters>
RK_DEVICE void take_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kRegisters));
}
template <int kRegisters>
RK_DEVICE void give_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kRegisters));
}
// What was written to a sum's registers is there before the fence that follows: the compiler moves it past no further.
template <int kCount>
RK_DEVICE void settle(float (&sum)[kCount]) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) asm volatile("" : "+f"(sum[i])::"memory");
}
RK_DEVICE void fence_products() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
// Until all products of this warpgroup are done; then the sums may be read. One wait for all: a second one, of nothing,
// costs a product.
template <int... kCounts>
RK_DEVICE void wait_for_products(float (&... sums)[kCounts]) {
  asm volatile("wgmma.commit_group.sync.aligned;\nwgmma.wait_group.sync.aligned 0;" ::: "memory");
  (settle(sums), ...);
}

#define RK_8(x, i) "+f"(x[i]), "+f"(x[i + 1]), "+f"(x[i + 2]), "+f"(x[i + 3]), "+f"(x[i + 4]), "+f"(x[i + 5]), \
                   "+f"(x[i + 6]), "+f"(x[i + 7])
#define RK_32(x, i) RK_8(x, i), RK_8(x, i + 8), RK_8(x, i + 16), RK_8(x, i + 24)
#define RK_NAMES_32 \
  "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, " \
  "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define RK_NAMES_64 \
  RK_NAMES_32 ", %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, " \
  "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"

#define RK_NAMES_128 \
  RK_NAMES_64 ", %64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, " \
  "%80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95, " \
  "%96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109, %110, %111, " \
  "%112, %113, %114, %115, %116, %117, %118, %119, %120, %121, %122, %123, %124, %125, %126, %127"
#define RK_LIST(...) __VA_ARGS__

// A product's right factor b in shared memory lies by rows (b^T [n x 16], 16 adjacent numbers a row: rows_descriptor)
// or by columns (b [16 x n], n adjacent numbers a row in panels of 64: columns_descriptor).

// sum[64 x 64] (+)= a[64 x 16] . b, a in shared memory by rows, or by columns (a^T [16 x 64]: columns_descriptor).
// `accumulate` 0: = .
#define RK_DOT(type, a_by_columns, by_columns)                                                              \
  asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %34, 0;\n"                                                 \
               "wgmma.mma_async.sync.aligned.m64n64k16.f32." type "." type " {" RK_NAMES_32                  \
               "}, %32, %33, p, 1, 1, " a_by_columns ", " by_columns ";\n}\n"                               \
               : RK_32(sum, 0)                                                                              \
               : "l"(a), "l"(b), "r"(accumulate))
// sum[64 x n] += a[64 x 16] . b, a in registers.
#define RK_ADD(type, n, by_columns, names, a0, a1, a2, a3, d, operands)                                                 \
  asm volatile("wgmma.mma_async.sync.aligned.m64n" n "k16.f32." type "." type " {" names "}, {" a0 ", " a1 ", " a2 ", " \
               a3 "}, " d ", 1, 1, 1, " by_columns ";\n"                                                               \
               : operands                                                                                              \
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b))
#define RK_ADD_64(type, by_columns) \
  RK_ADD(type, "64", by_columns, RK_NAMES_32, "%32", "%33", "%34", "%35", "%36", RK_LIST(RK_32(sum, 0)))
#define RK_ADD_128(type, by_columns)                                             \
  RK_ADD(type, "128", by_columns, RK_NAMES_64, "%64", "%65", "%66", "%67", "%68", \
         RK_LIST(RK_32(sum, 0), RK_32(sum, 32)))
#define RK_ADD_256(type, by_columns)                                                   \
  RK_ADD(type, "256", by_columns, RK_NAMES_128, "%128", "%129", "%130", "%131", "%132", \
         RK_LIST(RK_32(sum, 0), RK_32(sum, 32), RK_32(sum, 64), RK_32(sum, 96)))

#define RK_PRODUCTS(T, type)                                                                             \
  RK_DEVICE void multiply_rows(T, float (&sum)[32], uint64_t a, uint64_t b, int accumulate) { RK_DOT(type, "0", "0"); }    \
  RK_DEVICE void multiply_columns(T, float (&sum)[32], uint64_t a, uint64_t b, int accumulate) { RK_DOT(type, "0", "1"); } \
  RK_DEVICE void multiply_transposed(T, float (&sum)[32], uint64_t a, uint64_t b, int accumulate) {                   \
    RK_DOT(type, "1", "1");                                                                                          \
  }                                                                                                                  \
  RK_DEVICE void add_rows(T, float (&sum)[32], const uint32_t (&a)[4], uint64_t b) { RK_ADD_64(type, "0"); }          \
  RK_DEVICE void add_rows(T, float (&sum)[64], const uint32_t (&a)[4], uint64_t b) { RK_ADD_128(type, "0"); }         \
  RK_DEVICE void add_rows(T, float (&sum)[128], const uint32_t (&a)[4], uint64_t b) { RK_ADD_256(type, "0"); }        \
  RK_DEVICE void add_columns(T, float (&sum)[32], const uint32_t (&a)[4], uint64_t b) { RK_ADD_64(type, "1"); }       \
  RK_DEVICE void add_columns(T, float (&sum)[64], const uint32_t (&a)[4], uint64_t b) { RK_ADD_128(type, "1"); }
RK_PRODUCTS(BFloat16, "bf16")
RK_PRODUCTS(Float16, "f16")

}  // namespace sm90
}  // namespace retro_kernels
#endif

namespace retro_kernels {
namespace sm90 {

// ---- descriptors of a matrix in shared memory: panels of 64 numbers (128 bytes) a row, 8 rows a swizzled block
constexpr int kPanelRow = 128;  // bytes
constexpr int kBlock = 8 * kPanelRow;

// Of rows that lie along the product's sum: 16 numbers from `at` on. Blocks of 8 rows follow each other.
RK_DEVICE uint64_t rows_descriptor(Shared at) {
  const uint32_t address = shared_address(at);
  return (uint64_t{1} << 62) | (uint64_t{kBlock >> 4} << 32) | (uint64_t{1} << 16) | ((address & 0x3ffffu) >> 4);
}
// Of 16 rows, over which the product sums; `panel`: bytes from a panel of 64 columns to the next.
RK_DEVICE uint64_t columns_descriptor(Shared at, int panel) {
  const uint32_t address = shared_address(at);
  return (uint64_t{1} << 62) | (uint64_t{kBlock >> 4} << 32) | (static_cast<uint64_t>(panel >> 4) << 16) |
         ((address & 0x3ffffu) >> 4);
}
// Where 16 adjacent bytes lie in a panel: `byte` of a row, a multiple of 16.
RK_DEVICE int swizzled(int row, int byte) { return row * kPanelRow + (byte ^ ((row % 8) * 16)); }

}  // namespace sm90
}  // namespace retro_kernels
