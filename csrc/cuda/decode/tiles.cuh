// The two products of decoding, by a block of 128 threads, fp32 throughout: some rows of x with some slots, which are
// rows of a matrix in memory. A slot whose offset is negative is not read.
#pragma once
#include "octets.cuh"

namespace retro_kernels {
namespace decode {

struct alignas(16) Four {
  float x, y, z, w;
};

constexpr int kThreads = 128;
constexpr int kLanes = 8;                  // of a team, which reads a slot: 128 bytes of halves at once
constexpr int kTeams = kThreads / kLanes;  // slots that a block reads side by side
constexpr int kTogether = 4;               // slots a thread loads before it uses the first

// Rows of x in shared memory as fp32, the low and the high quarters of octets apart, so that a quarter of a warp reads
// adjacent 16 bytes: [row][2][octets] Four. Rows that `at` gives a negative offset are zero.
template <int kRows, class Offset>
RK_DEVICE void fill_rows(Type type, const void* x, int octets, Offset at, Four* rows) {
  for (int i = thread_index(); i < kRows * octets; i += kThreads) {
    const int row = i / octets, column = i % octets;
    const int64_t offset = at(row);
    Octet v = {};
    if (offset >= 0) v = load_octet(type, x, offset + 8 * column);
    Four* to = rows + 2 * row * octets + column;
    to[0] = Four{v.x[0], v.x[1], v.x[2], v.x[3]};
    to[octets] = Four{v.x[4], v.x[5], v.x[6], v.x[7]};
  }
}

// products[row * ld + slot] = x[row] . matrix[slot]; 0 for a slot that is not read.
template <int kType, int kRows>
RK_DEVICE void dot_slots(const void* matrix, const int64_t* offsets, int slots, int octets, const Four* rows,
                         float* products, int ld) {
  const int team = thread_index() / kLanes, lane = thread_index() % kLanes;
  for (int first = 0; first < slots; first += kTogether * kTeams) {
    int64_t offset[kTogether];
    float sum[kRows][kTogether];
#pragma unroll
    for (int s = 0; s < kTogether; ++s) {
      const int slot = first + s * kTeams + team;
      offset[s] = slot < slots ? offsets[slot] : -1;
#pragma unroll
      for (int r = 0; r < kRows; ++r) sum[r][s] = 0.0f;
    }
#pragma unroll 2
    for (int column = lane; column < octets; column += kLanes) {
      Raw<kType> raw[kTogether];
#pragma unroll
      for (int s = 0; s < kTogether; ++s) {
        raw[s] = {};
        if (offset[s] >= 0) raw[s] = load<kType>(matrix, offset[s] + 8 * column);
      }
      Octet y[kTogether];
#pragma unroll
      for (int s = 0; s < kTogether; ++s) y[s] = widen(raw[s]);
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
        const Four low = rows[2 * r * octets + column], high = rows[(2 * r + 1) * octets + column];
#pragma unroll
        for (int s = 0; s < kTogether; ++s)
          sum[r][s] += low.x * y[s].x[0] + low.y * y[s].x[1] + low.z * y[s].x[2] + low.w * y[s].x[3] +
                       high.x * y[s].x[4] + high.y * y[s].x[5] + high.z * y[s].x[6] + high.w * y[s].x[7];
      }
    }
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
#pragma unroll
      for (int s = 0; s < kTogether; ++s) {
        float total = sum[r][s];
#pragma unroll
        for (int distance = kLanes / 2; distance > 0; distance /= 2) total += shuffle_xor(total, distance);
        const int slot = first + s * kTeams + team;
        if (lane == 0 && slot < slots) products[r * ld + slot] = total;
      }
    }
  }
}

// write(row, column, sum over slots of weights[row * ld + slot] * matrix[slot][column]) for every column of the octets
// [first, last). `buffer`: kThreads octets of shared memory. All threads of the block call it; it ends with a barrier.
template <int kType, int kRows, class Write>
RK_DEVICE void sum_slots(const void* matrix, const int64_t* offsets, int slots, int first, int last,
                         const float* weights, int ld, Four* buffer, Write write) {
  int width = 1;  // threads side by side; those left over share the slots
  while (width < last - first && width < kThreads) width *= 2;
  const int groups = kThreads / width, group = thread_index() / width;
  for (int start = first; start < last; start += width) {
    const int column = start + thread_index() % width;
    const bool inside = column < last;
    float sum[kRows][8];
#pragma unroll
    for (int r = 0; r < kRows; ++r)
#pragma unroll
      for (int i = 0; i < 8; ++i) sum[r][i] = 0.0f;
    for (int next = group; next < slots; next += kTogether * groups) {
      Raw<kType> raw[kTogether];
#pragma unroll
      for (int s = 0; s < kTogether; ++s) {
        const int slot = next + s * groups;
        raw[s] = {};
        if (inside && slot < slots && offsets[slot] >= 0) raw[s] = load<kType>(matrix, offsets[slot] + 8 * column);
      }
#pragma unroll
      for (int s = 0; s < kTogether; ++s) {
        const int slot = next + s * groups;
        const Octet y = widen(raw[s]);
#pragma unroll
        for (int r = 0; r < kRows; ++r) {
          const float weight = slot < slots ? weights[r * ld + slot] : 0.0f;
#pragma unroll
          for (int i = 0; i < 8; ++i) sum[r][i] += weight * y.x[i];
        }
      }
    }
    // The groups' sums one after the other, so that the order is fixed.
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      buffer[thread_index()] = Four{sum[r][0], sum[r][1], sum[r][2], sum[r][3]};
      buffer[kThreads + thread_index()] = Four{sum[r][4], sum[r][5], sum[r][6], sum[r][7]};
      block_barrier();
      for (int i = thread_index(); i < 8 * width; i += kThreads) {
        const int octet = i / 8, part = i % 8;
        const float* from = reinterpret_cast<const float*>(buffer + (part / 4) * kThreads + octet) + part % 4;
        float total = from[0];
        for (int g = 1; g < groups; ++g) total += from[4 * g * width];
        if (start + octet < last) write(r, 8 * (start + octet) + part, total);
      }
      block_barrier();
    }
  }
}

}  // namespace decode
}  // namespace retro_kernels
