// Tiles: rows of 16-bit numbers in shared memory, how they get there, and how a warp multiplies them.
#pragma once
#include "group.cuh"

namespace retro_kernels {

// Rows of `COLUMNS` elements, in chunks of 16 bytes. Eight rows' chunks of one column lie in different banks: by
// exchanging chunks where a row is a multiple of 128 bytes or half of that, otherwise by an odd row length.
template <int COLUMNS>
struct TileLayout {
  static constexpr int kChunks = COLUMNS / 8;
  static constexpr bool kExchanged = kChunks % 8 == 0 || kChunks == 4;
  static constexpr int kPeriod = kExchanged ? 8 : 1;  // rows after which chunks lie alike
  static constexpr int kRowBytes = (kExchanged ? kChunks : kChunks | 1) * 16;
  static_assert(COLUMNS % 8 == 0, "a row is whole chunks of 16 bytes");

  RK_HOST_DEVICE static constexpr uint32_t bytes(int rows) { return rows * kRowBytes; }

  RK_DEVICE static Shared chunk(Shared tile, int row, int chunk) {
    const int exchanged = kChunks == 4 ? chunk ^ (row / 2 & 3) : chunk ^ (row & 7);
    return tile + row * kRowBytes + (kExchanged ? exchanged : chunk) * 16;
  }

  RK_DEVICE static Shared pair(Shared tile, int row, int column) {
    return chunk(tile, row, column / 8) + column % 8 * 2;
  }
};

// Rows of a tile whose copies a thread starts, one chunk of each: `first(thread)`, and every `kApart`th from there.
template <int COLUMNS, int THREADS>
struct RowsOfThread {
  static constexpr int kChunks = COLUMNS / 8, kApart = THREADS / kChunks;
  RK_DEVICE static int first() { return thread_index() / kChunks; }
};

// Starts the copies of `ROWS` rows; row i is element places.at(first + i) where it is wanted, otherwise zero.
// `wanted(row, later)`: `row` is `later` after the thread's first, a constant. Of many rows one place is computed, and the
// address moves on from one to the next; that takes registers, which few do not repay. (The address of a row that is not
// wanted may be anything: it is not read.)
template <int COLUMNS, int ROWS, int THREADS, class Wanted>
RK_DEVICE void start_rows(Shared tile, const uint16_t* data, const Places& places, int first, Wanted wanted) {
  using Mine = RowsOfThread<COLUMNS, THREADS>;
  using Layout = TileLayout<COLUMNS>;
  constexpr int kApart = Mine::kApart;
  static_assert(kApart % Layout::kPeriod == 0, "the rows of a thread have their chunk at one place");
  constexpr bool kFew = ROWS <= 4 * kApart;
  int thread = thread_index();
  if (kFew) renew(thread);
  if (THREADS % Mine::kChunks != 0 && thread >= kApart * Mine::kChunks) return;
  const int chunk = thread % Mine::kChunks, mine = thread / Mine::kChunks;
  const Shared to = Layout::chunk(tile, mine, chunk);
  data += chunk * 8;
  if constexpr (kFew) {
#pragma unroll
    for (int later = 0; later < ROWS; later += kApart)
      if (later + kApart <= ROWS || mine + later < ROWS)
        copy_async(to + later * Layout::kRowBytes, data + places.at(first + mine + later), wanted(mine + later, later));
  } else {
    const int runs_apart = divide(kApart, places.by_length);
    const int64_t back = 2 * (places.outer - places.length * places.inner);  // in bytes, as `from` and `apart`
    const int64_t apart = 2 * kApart * places.inner + runs_apart * back;
    const char* from = reinterpret_cast<const char*>(data + places.at(first + mine));
    int place = first + mine - divide(first + mine, places.by_length) * places.length;  // in its run
#pragma unroll
    for (int later = 0; later < ROWS; later += kApart) {
      if (later + kApart > ROWS && mine + later >= ROWS) return;
      copy_async(to + later * Layout::kRowBytes, from, wanted(mine + later, later));
      place += kApart - runs_apart * places.length;
      const bool crosses = place >= places.length;
      from += apart + (crosses ? back : 0);
      place -= crosses ? places.length : 0;
    }
  }
}

// The operands of one warp's products, by ldmatrix. `row` and `column` are multiples of 8.
// a [16 x 16] from rows of the tile:
template <int COLUMNS>
RK_DEVICE void load_a(uint32_t (&a)[4], Shared tile, int row, int column) {
  const int lane = lane_index();
  load_matrices(a, TileLayout<COLUMNS>::chunk(tile, row + lane % 16, column / 8 + lane / 16));
}

// a [16 x 16] = the transpose of tile [column.. + 16 rows, row.. + 16 columns]:
template <int COLUMNS>
RK_DEVICE void load_a_transposed(uint32_t (&a)[4], Shared tile, int row, int column) {
  const int lane = lane_index();
  load_matrices_transposed(
      a, TileLayout<COLUMNS>::chunk(tile, column + lane % 8 + lane / 16 * 8, row / 8 + lane / 8 % 2));
}

// Two b [16 x 8] side by side = the transpose of tile [n.. + 16 rows, k.. + 16 columns]; b[0], b[1] are the first.
template <int COLUMNS>
RK_DEVICE void load_b_transposed(uint32_t (&b)[4], Shared tile, int k, int n) {
  const int lane = lane_index();
  load_matrices(b, TileLayout<COLUMNS>::chunk(tile, n + lane % 8 + lane / 16 * 8, k / 8 + lane / 8 % 2));
}

// Two b [16 x 8] side by side = tile [k.. + 16 rows, n.. + 16 columns].
template <int COLUMNS>
RK_DEVICE void load_b(uint32_t (&b)[4], Shared tile, int k, int n) {
  const int lane = lane_index();
  load_matrices_transposed(b, TileLayout<COLUMNS>::chunk(tile, k + lane % 16, n / 8 + lane / 16));
}

// Sums over tiles of 8 columns: element [2 * half + e] of tile n is row lane / 4 + 8 half, column 8 n + 2 (lane % 4) + e.
template <int N>
RK_DEVICE void clear(float (&c)[N][4]) {
#pragma unroll
  for (int n = 0; n < N; ++n)
#pragma unroll
    for (int e = 0; e < 4; ++e) c[n][e] = 0.0f;
}

// Row `half` of this lane: what its weights of 0 met may have been NaN.
template <int N>
RK_DEVICE void clear_row(float (&c)[N][4], int half) {
#pragma unroll
  for (int n = 0; n < N; ++n) c[n][2 * half] = c[n][2 * half + 1] = 0.0f;
}

// c [16 x 8 N] += a [16 x K] b [K x 8 N]: left(a, k) loads 16 columns from k on, right(b, k, n) two tiles of 8 columns
// from column n on. (Of an odd N the last tile's neighbour is loaded and not used.)
template <class T, int K, int UNROLL = K / 16, int N, class Left, class Right>
RK_DEVICE void multiply(float (&c)[N][4], Left left, Right right) {
#pragma unroll UNROLL
  for (int k = 0; k < K; k += 16) {
    uint32_t a[4];
    left(a, k);
#pragma unroll
    for (int n = 0; n < N; n += 2) {
      uint32_t b[4];
      right(b, k, 8 * n);
      multiply_add(T(), c[n], a, b[0], b[1]);
      if (n + 1 < N) multiply_add(T(), c[n + 1], a, b[2], b[3]);
    }
  }
}

// Writes rows of sums times `factor`, rounded to T: row half + 0 and row half + 1 of this lane go to `to[half]`, at
// column `8 n` of it, where `wanted[half]`. Four lanes that share a row exchange their pairs, so that each writes 16
// bytes. `to` must be aligned to 16 bytes.
template <class T, int N>
RK_DEVICE void store_rows(const float (&c)[N][4], const float (&factor)[2], uint16_t* const (&to)[2],
                          const bool (&wanted)[2]) {
  const int t = lane_index() % 4;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
#pragma unroll
    for (int n = 0; n + 4 <= N; n += 4) {
      uint32_t x[4];
#pragma unroll
      for (int j = 0; j < 4; ++j) x[j] = pack(T(), c[n + j][2 * half] * factor[half], c[n + j][2 * half + 1] * factor[half]);
      // transpose the 4 x 4 pairs: lane t receives the four of tile n + t
#pragma unroll
      for (int j = 0; j < 4; j += 2) {
        const uint32_t other = shuffle_xor(t & 1 ? x[j] : x[j + 1], 1);
        (t & 1 ? x[j] : x[j + 1]) = other;
      }
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        const uint32_t other = shuffle_xor(t & 2 ? x[j] : x[j + 2], 2);
        (t & 2 ? x[j] : x[j + 2]) = other;
      }
      if (wanted[half]) *reinterpret_cast<Vector16*>(to[half] + (n + t) * 8) = {x[0], x[1], x[2], x[3]};
    }
#pragma unroll
    for (int n = N / 4 * 4; n < N; ++n)
      if (wanted[half])
        *reinterpret_cast<uint32_t*>(to[half] + n * 8 + t * 2) =
            pack(T(), c[n][2 * half] * factor[half], c[n][2 * half + 1] * factor[half]);
  }
}

}  // namespace retro_kernels
