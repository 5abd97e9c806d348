// Matrix products in register tiles, and the prefetch that runs between them.
#pragma once
#include "simd.h"

namespace retro_kernels {
namespace RK_NAMESPACE {
namespace {

RK_INLINE int64_t round_up(int64_t x, int64_t to) { return (x + to - 1) / to * to; }
RK_INLINE int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
RK_INLINE int64_t most(int64_t a, int64_t b) { return a > b ? a : b; }
RK_INLINE float infinity() { return __builtin_inff(); }

constexpr int kDepth = 128;  // summed indices per pass of the register tile: a panel of 128 x kPanel stays in L1

// What comes next, fetched into L2 a little after every register tile: the keys and values of a key block, the rows of a
// row block, and where those rows' results will be written. Rows of one head lie a whole token apart, which hardware
// prefetchers do not follow.
struct Prefetch {
  struct Stream {
    const char* row;
    int64_t step, bytes;
  };
  struct Lines {  // rows of all runs (query head, neighbour), one run after the other
    const char *start, *row;
    int64_t token, neighbour, head, bytes;  // steps, and the length of a row
  };
  int64_t quota = 0;            // rows per tile
  int64_t slots = 0, rows = 0;  // what is left
  int64_t token = 0, retrieved = 1;
  Stream key, value;                     // one row per slot
  int64_t key_jump = 0, value_jump = 0;  // from the first token of a neighbour to that of the next
  const char *key_start = nullptr, *value_start = nullptr;
  Lines lines[4];
  int streams = 0;
  int64_t row_token = 0, tokens = 1, neighbour = 0, neighbours = 1, head = 0;  // where the rows are

  RK_INLINE void fetch(const char* row, int64_t bytes) {
    const char* end = row + bytes;
    for (const char* line = (const char*)((uintptr_t)row & ~(uintptr_t)63); line < end; line += 64)
      __builtin_prefetch(line, 0, 2);
  }

  void start_run() {
    for (int j = 0; j < streams; ++j)
      lines[j].row = lines[j].start + head * lines[j].head + neighbour * lines[j].neighbour + row_token * lines[j].token;
  }

  void step() {
    for (int64_t i = 0; i < quota; ++i) {
      if (slots > 0) {
        fetch(key.row, key.bytes);
        fetch(value.row, value.bytes);
        key.row += key.step;
        value.row += value.step;
        if (++token == retrieved) {
          token = 0;
          key.row = key_start += key_jump;
          value.row = value_start += value_jump;
        }
        --slots;
      } else if (rows > 0) {
        for (int j = 0; j < streams; ++j) {
          fetch(lines[j].row, lines[j].bytes);
          lines[j].row += lines[j].token;
        }
        --rows;
        if (++row_token == tokens) {
          row_token = 0;
          if (++neighbour == neighbours) neighbour = 0, ++head;
          start_run();
        }
      } else {
        quota = 0;
      }
    }
  }
};

// ---------------------------------------------------------------------------------------------- matrix products

template <int kVectors, bool kDown, bool kPairs, bool kAdd>
RK_INLINE void tile(int64_t depth, const float* a, int64_t lda, const float* b, int64_t ldb, float* c, int64_t ldc) {
  vfloat acc[kTileRows][kVectors];
  RK_UNROLL for (int i = 0; i < kTileRows; ++i)
    RK_UNROLL for (int v = 0; v < kVectors; ++v) acc[i][v] = vfloat{};
  for (int64_t k = 0; k < depth; ++k) {
    vfloat bv[kVectors];
    RK_UNROLL for (int v = 0; v < kVectors; ++v) bv[v] = load(b + k * ldb + v * kLanes);
    RK_UNROLL for (int i = 0; i < kTileRows; ++i) {
      const float x = kDown ? a[k * lda + i] : a[i * lda + k];
      RK_UNROLL for (int v = 0; v < kVectors; ++v) acc[i][v] = multiply_add<kPairs>(acc[i][v], x, bv[v]);
    }
  }
  RK_UNROLL for (int i = 0; i < kTileRows; ++i)
    RK_UNROLL for (int v = 0; v < kVectors; ++v) {
      float* p = c + i * ldc + v * kLanes;
      store(p, kAdd ? load(p) + acc[i][v] : acc[i][v]);
    }
}

template <bool kDown, bool kPairs, bool kAdd>
static __attribute__((noinline)) void multiply_strip(
    int64_t rows, int64_t vectors, int64_t depth, const float* a, int64_t lda, const float* b, int64_t ldb,
    int64_t panel, float* c, int64_t ldc, Prefetch* next) {
  int64_t v = 0;
  for (; v + 2 <= vectors; v += 2)
    for (int64_t i = 0; i < rows; i += kTileRows) {
      tile<2, kDown, kPairs, kAdd>(depth, kDown ? a + i : a + i * lda, lda, b + v / 2 * panel, ldb,
                                   c + i * ldc + v * kLanes, ldc);
      if (next->quota > 0) next->step();
    }
  if (v < vectors)
    for (int64_t i = 0; i < rows; i += kTileRows)
      tile<1, kDown, kPairs, kAdd>(depth, kDown ? a + i : a + i * lda, lda, b + v / 2 * panel, ldb,
                                   c + i * ldc + v * kLanes, ldc);
}

// C[rows, columns] (+)= A B. A is [rows][depth], or with kDown [depth][rows]; kPanel columns of B start every `panel`
// elements. `rows` is a multiple of kTileRows and `columns` of kLanes.
template <bool kDown, bool kPairs>
RK_INLINE void multiply(int64_t rows, int64_t columns, int64_t depth, const float* a, int64_t lda, const float* b,
                        int64_t ldb, int64_t panel, float* c, int64_t ldc, bool add, Prefetch* next) {
  for (int64_t k = 0; k < depth; k += kDepth) {
    const int64_t n = least(kDepth, depth - k);
    const float* at = kDown ? a + k * lda : a + k;
    if (add || k > 0)
      multiply_strip<kDown, kPairs, true>(rows, columns / kLanes, n, at, lda, b + k * ldb, ldb, panel, c, ldc,
                                          next);
    else
      multiply_strip<kDown, kPairs, false>(rows, columns / kLanes, n, at, lda, b + k * ldb, ldb, panel, c, ldc,
                                           next);
  }
}

}  // namespace
}  // namespace RK_NAMESPACE
}  // namespace retro_kernels
