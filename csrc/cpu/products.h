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

// C[rows, columns] (+)= A B in register tiles; see `multiply`.
template <bool kDown, bool kPairs, bool kAdd>
RK_INLINE void multiply_vectors(int64_t rows, int64_t vectors, int64_t depth, const float* a, int64_t lda, const float* b,
                                int64_t ldb, int64_t panel, float* c, int64_t ldc, Prefetch* next) {
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

#if RK_LEVEL >= 4
// AMX: a tile register holds 16 rows of 16 elements. Each entry of the level has one of these, since registers belong to
// a thread, and what is left in them would be saved at every switch of threads.
struct TileRegisters {
  TileRegisters() {
    struct {
      uint8_t palette = 1, start_row = 0, reserved[14] = {};
      uint16_t bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
      uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
    } config;
    __asm__ volatile("ldtilecfg %0" : : "m"(config));  // GCC's _tile_loadconfig knows of its first 8 bytes only
  }
  ~TileRegisters() { _tile_release(); }
};

// 16 or (kTall) 32 rows, 16 or (kWide) 32 columns of C. The rows' 16 elements of step k begin at a + k * step, those of
// the lower 16 rows `lower` further.
template <bool kTall, bool kWide, bool kAdd>
RK_INLINE void multiply_tiles(int64_t depth, const float* a, int64_t step, int64_t lower, int64_t lda, const float* b,
                              int64_t ldb, float* c, int64_t ldc) {
  const int64_t bytes_a = lda * 4, bytes_b = ldb * 4, bytes_c = ldc * 4;
  if constexpr (kAdd) {
    _tile_loadd(0, c, bytes_c);
    if constexpr (kWide) _tile_loadd(1, c + 16, bytes_c);
    if constexpr (kTall) _tile_loadd(2, c + 16 * ldc, bytes_c);
    if constexpr (kTall && kWide) _tile_loadd(3, c + 16 * ldc + 16, bytes_c);
  } else {
    _tile_zero(0);
    if constexpr (kWide) _tile_zero(1);
    if constexpr (kTall) _tile_zero(2);
    if constexpr (kTall && kWide) _tile_zero(3);
  }
  for (int64_t k = 0; k < depth; k += 16, a += step, b += 16 * ldb) {
    _tile_loadd(4, a, bytes_a);
    if constexpr (kTall) _tile_loadd(5, a + lower, bytes_a);
    _tile_loadd(6, b, bytes_b);
    if constexpr (kWide) _tile_loadd(7, b + 16, bytes_b);
    _tile_dpbf16ps(0, 4, 6);
    if constexpr (kWide) _tile_dpbf16ps(1, 4, 7);
    if constexpr (kTall) _tile_dpbf16ps(2, 5, 6);
    if constexpr (kTall && kWide) _tile_dpbf16ps(3, 5, 7);
  }
  _tile_stored(0, c, bytes_c);
  if constexpr (kWide) _tile_stored(1, c + 16, bytes_c);
  if constexpr (kTall) _tile_stored(2, c + 16 * ldc, bytes_c);
  if constexpr (kTall && kWide) _tile_stored(3, c + 16 * ldc + 16, bytes_c);
}

// Whole tiles: `rows` and `depth` are multiples of 16, and with kDown `depth` is at most kDepth.
template <bool kDown, bool kAdd>
RK_INLINE void multiply_registers(int64_t rows, int64_t vectors, int64_t depth, const float* a, int64_t lda,
                                  const float* b, int64_t ldb, int64_t panel, float* c, int64_t ldc, Prefetch* next) {
  float turned[kDown ? 32 * kDepth : 1] __attribute__((aligned(64)));  // two tiles for every 16 elements summed over
  for (int64_t i = 0; i < rows; i += 32) {
    const bool tall = i + 32 <= rows;
    const float* from = a + i * lda;
    int64_t step = 16, lower = 16 * lda, ld = lda;
    if constexpr (kDown) {
      for (int64_t k = 0; k < depth; k += 16)
        for (int64_t x = 0; x < (tall ? 32 : 16); x += 16)
          transpose_square(a + k * lda + i + x, lda, turned + 2 * k * 16 + x * 16, 16);
      from = turned, step = 512, lower = 256, ld = 16;
    }
    __asm__ volatile("" ::: "memory");  // GCC does not know that a tile is loaded from memory
    for (int64_t v = 0; v < vectors; v += 2) {
      const float* columns = b + v / 2 * panel;
      float* to = c + i * ldc + v * kLanes;
      if (v + 2 > vectors)
        tall ? multiply_tiles<true, false, kAdd>(depth, from, step, lower, ld, columns, ldb, to, ldc)
             : multiply_tiles<false, false, kAdd>(depth, from, step, lower, ld, columns, ldb, to, ldc);
      else
        tall ? multiply_tiles<true, true, kAdd>(depth, from, step, lower, ld, columns, ldb, to, ldc)
             : multiply_tiles<false, true, kAdd>(depth, from, step, lower, ld, columns, ldb, to, ldc);
      for (int x = 0; x < (tall ? 32 : 16) && next->quota > 0; x += kTileRows) next->step();
    }
  }
}
#else
struct TileRegisters {};
#endif

// The same with tile registers where there are any; what does not fill one, in vectors.
template <bool kDown, bool kPairs, bool kAdd>
static __attribute__((noinline)) void multiply_strip(
    int64_t rows, int64_t vectors, int64_t depth, const float* a, int64_t lda, const float* b, int64_t ldb,
    int64_t panel, float* c, int64_t ldc, Prefetch* next) {
#if RK_LEVEL >= 4
  if constexpr (kPairs) {
    const int64_t tall = rows / 16 * 16, deep = depth / 16 * 16;
    if (tall > 0 && deep > 0) {
      multiply_registers<kDown, kAdd>(tall, vectors, deep, a, lda, b, ldb, panel, c, ldc, next);
      if (deep < depth)
        multiply_vectors<kDown, true, true>(tall, vectors, depth - deep, kDown ? a + deep * lda : a + deep, lda,
                                            b + deep * ldb, ldb, panel, c, ldc, next);
      a += kDown ? tall : tall * lda;
      c += tall * ldc;
      rows -= tall;
    }
  }
#endif
  multiply_vectors<kDown, kPairs, kAdd>(rows, vectors, depth, a, lda, b, ldb, panel, c, ldc, next);
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
