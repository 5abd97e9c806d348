// Projections for decoding from encoder states: W_k on the queries of a few tokens, W_v on the weighted sums of states.
//
// Floor: the bytes of the weights, each read once for all tokens of a call; 7.3 MB each and 2.2 us at 3.35 TB/s for 32
// heads of 128 and e = 896 in bf16. Weights are not written while decoding, so a block asks for its part into the L2
// cache while the kernel before it still runs, and reads it only after that kernel's end.
#pragma once
#include "tiles.cuh"

namespace retro_kernels {
namespace decode {

constexpr int kWeightRows = 32;     // a block's, where it multiplies with rows
constexpr int kWeightOctets = 32;   // a block's columns, where it adds rows up

template <int kRows>
struct ProjectShared {
  int64_t offsets[kMostAdded];
  float products[kRows][kMostAdded];
  Four buffer[2 * kThreads];
  // then the rows of x, where it multiplies with rows: [kRows][2][columns / 8] Four
};

// Of a head's weight: a block has one.
RK_HOST_DEVICE int project_parts(const Project& p) {
  return p.transposed ? (p.rows + kWeightRows - 1) / kWeightRows : (p.columns / 8 + kWeightOctets - 1) / kWeightOctets;
}

// Blocks: (key/value head, part of its weight, tile of x's rows), the last fastest.
template <int kType, int kRows>
RK_KERNEL(kThreads, 3) project_kernel(RK_PARAMETER Project p) {
  let_successor_start();
  auto& f = *shared_pointer<ProjectShared<kRows>>(0);
  Four* x_rows = reinterpret_cast<Four*>(&f + 1);
  const int group = p.heads / p.kv_heads, octets = p.columns / 8;
  const int x_tiles = (p.count * group + kRows - 1) / kRows, parts = project_parts(p);
  const int x_tile = block_index() % x_tiles, part = block_index() / x_tiles % parts;
  const int kv_head = block_index() / x_tiles / parts;
  const int first_row = p.transposed ? part * kWeightRows : 0;
  const int rows = p.transposed ? (p.rows - first_row < kWeightRows ? p.rows - first_row : kWeightRows) : p.rows;
  const int first_octet = p.transposed ? 0 : part * kWeightOctets;
  const int last_octet = p.transposed || octets < first_octet + kWeightOctets ? octets : first_octet + kWeightOctets;
  for (int i = thread_index(); i < rows; i += kThreads) {
    f.offsets[i] = kv_head * p.weight_stride[0] + (first_row + i) * p.weight_stride[1];
    for (int octet = first_octet; octet < last_octet; octet += 8)  // 8 octets of halves are 128 bytes
      prefetch(address<kType>(p.weight, f.offsets[i] + 8 * octet));
  }
  wait_for_predecessor();

  const auto place = [&](int r) {  // row of x as (n, head), -1 beyond the last
    const int i = x_tile * kRows + r, token = i / group;
    return token < p.count ? static_cast<int64_t>(token) * p.heads + kv_head * group + i % group : -1;
  };
  const auto x_at = [&](int r) {
    const int64_t at = place(r);
    return at < 0 ? at : at / p.heads * p.x_stride[0] + at % p.heads * p.x_stride[1];
  };
  const int64_t width = p.transposed ? p.rows : p.columns;
  const auto write = [&](int r, int column, float x) {
    const int64_t at = place(r);
    if (at >= 0) store_number(p.type, p.out, at * width + column, x);
  };
  float* products = &f.products[0][0];
  if (p.transposed) {
    fill_rows<kRows>(p.type, p.x, octets, x_at, x_rows);
    block_barrier();
    dot_slots<kType, kRows>(p.weight, f.offsets, rows, octets, x_rows, products, kMostAdded);
    block_barrier();
    for (int i = thread_index(); i < kRows * rows; i += kThreads)
      write(i / rows, first_row + i % rows, f.products[i / rows][i % rows]);
  } else {
    for (int i = thread_index(); i < kRows * rows; i += kThreads) {
      const int64_t at = x_at(i / rows);
      f.products[i / rows][i % rows] = at < 0 ? 0.0f : load_number(p.type, p.x, at + i % rows);
    }
    block_barrier();
    sum_slots<kType, kRows>(p.weight, f.offsets, rows, first_octet, last_octet, products, kMostAdded, f.buffer, write);
  }
}

}  // namespace decode
}  // namespace retro_kernels
