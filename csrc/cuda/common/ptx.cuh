// Every PTX instruction of sm_80 that the kernels use, each with what the emulator does in its place.
#pragma once
#include "elements.cuh"
#include "problem.h"

namespace retro_kernels {

struct alignas(16) Vector16 {
  uint32_t x, y, z, w;
};

#if !defined(RK_EMULATED)

RK_DEVICE void block_barrier() { __syncthreads(); }
RK_DEVICE void warp_barrier() { __syncwarp(); }

// `count` threads, a multiple of 32, meet at barrier `id` (0 is block_barrier's).
RK_DEVICE void named_barrier(int id, int count) { asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(count) : "memory"); }

RK_DEVICE uint32_t ballot(bool predicate) { return __ballot_sync(0xffffffffu, predicate); }
RK_DEVICE float shuffle_xor(float x, int mask) { return __shfl_xor_sync(0xffffffffu, x, mask); }
RK_DEVICE uint32_t shuffle_xor(uint32_t x, int mask) { return __shfl_xor_sync(0xffffffffu, x, mask); }

// 16 bytes into shared memory past the first-level cache; zeros where not `valid`, and nothing is read then.
RK_DEVICE void copy_async(Shared to, const void* from, bool valid) {
  asm volatile("{\n.reg .pred zero;\nsetp.eq.b32 zero, %2, 0;\ncp.async.cg.shared.global [%0], [%1], 16, zero;\n}\n" ::"r"(
                   shared_address(to)),
               "l"(from), "r"(static_cast<int>(valid))
               : "memory");
}

RK_DEVICE void copy_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Waits for all but the `PENDING` youngest groups of this thread.
template <int PENDING>
RK_DEVICE void copy_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(PENDING) : "memory");
}

// Four 8 x 8 matrices; lane i gives the address of row i % 8 of matrix i / 8, and receives elements 2 (i % 4) and the
// next of row i / 4 of each.
RK_DEVICE void load_matrices(uint32_t (&r)[4], Shared row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address(row))
               : "memory");
}

// The same, each matrix transposed.
RK_DEVICE void load_matrices_transposed(uint32_t (&r)[4], Shared row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address(row))
               : "memory");
}

// c [16 x 8] += a [16 x 16] b [16 x 8].
RK_DEVICE void multiply_add(BFloat16, float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

RK_DEVICE void multiply_add(Float16, float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm(
      "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

RK_DEVICE float exp2_fast(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
// The larger and the smaller of two numbers, NaN where one of them is: fmaxf and fminf would drop it.
RK_DEVICE float larger(float x, float y) {
  float z;
  asm("max.NaN.f32 %0, %1, %2;" : "=f"(z) : "f"(x), "f"(y));
  return z;
}
RK_DEVICE float smaller(float x, float y) {
  float z;
  asm("min.NaN.f32 %0, %1, %2;" : "=f"(z) : "f"(x), "f"(y));
  return z;
}
// A number anew: what depends on it is computed again rather than kept in registers over a loop.
RK_DEVICE void renew(int& x) { asm volatile("" : "+r"(x)); }
RK_DEVICE int divide(int i, Divisor by) {
  return static_cast<int>(__umulhi(2u * static_cast<unsigned>(i), by.multiplier) >> by.shift);
}
// A product that no sum takes in unrounded (FMA): what is subtracted from itself is 0.
RK_DEVICE float multiply_rounded(float x, float y) { return __fmul_rn(x, y); }

#else

inline void block_barrier() { emulator::current()->barrier(0, emulator::current()->threads); }
inline void named_barrier(int id, int count) { emulator::current()->barrier(id, count); }
inline void warp_barrier() {
  emulator::current()->collective("__syncwarp", nullptr, [](void**) {});
}

inline uint32_t ballot(bool predicate) {
  struct Lane {
    bool predicate;
    uint32_t all;
  } mine{predicate, 0};
  emulator::current()->collective("ballot", &mine, [](void** lanes) {
    uint32_t all = 0;
    for (int i = 0; i < 32; ++i) all |= static_cast<uint32_t>(static_cast<Lane*>(lanes[i])->predicate) << i;
    for (int i = 0; i < 32; ++i) static_cast<Lane*>(lanes[i])->all = all;
  });
  return mine.all;
}

template <class X>
X shuffle_xor(X x, int mask) {
  struct Lane {
    X given, taken;
    int mask;
  } mine{x, X(), mask};
  emulator::current()->collective("shfl.xor", &mine, [](void** lanes) {
    for (int i = 0; i < 32; ++i) {
      Lane& lane = *static_cast<Lane*>(lanes[i]);
      lane.taken = static_cast<Lane*>(lanes[i ^ lane.mask])->given;
    }
  });
  return mine.taken;
}

inline void copy_async(Shared to, const void* from, bool valid) { emulator::start_copy(to, from, 16, valid ? 16 : 0); }
inline void copy_commit() { emulator::commit_copies(); }
template <int PENDING>
void copy_wait() {
  emulator::land_copies(PENDING);
}

namespace emulator {

// ldmatrix.x4 by the fragment layout of the PTX ISA.
inline void load_four(uint32_t (&r)[4], Shared row, bool transposed) {
  struct Lane {
    const uint16_t* row;
    uint32_t r[4];
  } mine{reinterpret_cast<const uint16_t*>(current()->shared(row, 16, 16)), {}};
  current()->collective(transposed ? "ldmatrix.trans" : "ldmatrix", &mine, [transposed](void** lanes) {
    for (int i = 0; i < 32; ++i)
      for (int matrix = 0; matrix < 4; ++matrix) {
        uint32_t pair = 0;
        for (int e = 0; e < 2; ++e) {
          const int across = i / 4, along = 2 * (i % 4) + e;
          const int y = transposed ? along : across, x = transposed ? across : along;
          pair |= static_cast<uint32_t>(static_cast<Lane*>(lanes[8 * matrix + y])->row[x]) << 16 * e;
        }
        static_cast<Lane*>(lanes[i])->r[matrix] = pair;
      }
  });
  for (int i = 0; i < 4; ++i) r[i] = mine.r[i];
}

// mma.m16n8k16 by the fragment layouts of the PTX ISA: g = lane / 4, t = lane % 4.
template <class T>
void multiply_add(T type, float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  struct Lane {
    float* c;
    const uint32_t* a;
    uint32_t b[2];
  } mine{c, a, {b0, b1}};
  current()->collective("mma", &mine, [type](void** lanes) {
    float left[16][16], right[16][8];
    const auto half = [&](uint32_t pair, int e) { return widen(type, static_cast<uint16_t>(pair >> 16 * e)); };
    for (int i = 0; i < 32; ++i) {
      const Lane& lane = *static_cast<Lane*>(lanes[i]);
      const int g = i / 4, t = i % 4;
      for (int e = 0; e < 2; ++e) {
        for (int j = 0; j < 4; ++j) left[g + 8 * (j % 2)][2 * t + e + 8 * (j / 2)] = half(lane.a[j], e);
        for (int j = 0; j < 2; ++j) right[2 * t + e + 8 * j][g] = half(lane.b[j], e);
      }
    }
    for (int i = 0; i < 32; ++i) {
      const Lane& lane = *static_cast<Lane*>(lanes[i]);
      for (int j = 0; j < 4; ++j) {
        const int y = i / 4 + 8 * (j / 2), x = 2 * (i % 4) + j % 2;
        float sum = lane.c[j];
        for (int k = 0; k < 16; ++k) sum += left[y][k] * right[k][x];
        lane.c[j] = sum;
      }
    }
  });
}

}  // namespace emulator

inline void load_matrices(uint32_t (&r)[4], Shared row) { emulator::load_four(r, row, false); }
inline void load_matrices_transposed(uint32_t (&r)[4], Shared row) { emulator::load_four(r, row, true); }
template <class T>
void multiply_add(T type, float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  emulator::multiply_add(type, c, a, b0, b1);
}
inline float exp2_fast(float x) { return std::exp2(x); }
inline float larger(float x, float y) { return x > y || x != x ? x : y; }
inline float smaller(float x, float y) { return x < y || x != x ? x : y; }
inline float multiply_rounded(float x, float y) { return x * y; }
inline void renew(int&) {}
inline int divide(int i, Divisor by) {
  return static_cast<int>((uint64_t{2} * static_cast<unsigned>(i) * by.multiplier >> 32) >> by.shift);
}

#endif

// Of a weight: exp2(x) where x is at most 0 but for its rounding, which large logits make large. NaN stays.
RK_DEVICE float exp2_bounded(float x) { return exp2_fast(smaller(x, 0.0f)); }

// sum += x . y, of eight numbers each.
template <class T>
RK_DEVICE void add_dot(T type, float& sum, const Vector16& x, const Vector16& y) {
  const uint32_t xs[4] = {x.x, x.y, x.z, x.w}, ys[4] = {y.x, y.y, y.z, y.w};
#pragma unroll
  for (int j = 0; j < 4; ++j) {
    float a, b, c, d;
    unpack(type, xs[j], a, b);
    unpack(type, ys[j], c, d);
    sum += a * c + b * d;
  }
}

}  // namespace retro_kernels
