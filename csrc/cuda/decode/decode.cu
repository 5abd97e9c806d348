#include "../common/launch.cuh"
#include "attend.cuh"
#include "kernels.h"
#include "project.cuh"

namespace retro_kernels {
namespace decode {
namespace {

constexpr size_t kMostQueryBytes = 64 << 10;  // of a block's rows as fp32, up to which it takes more rows

// Rows of a block: few, or as many as 8 where more would share what it reads. Each is `floats` numbers of shared
// memory.
int rows_of_block(int rows, int floats) {
  int most = rows <= 1 ? 1 : rows <= 2 ? 2 : rows <= 4 ? 4 : 8;
  while (most > 1 && sizeof(float) * most * floats > kMostQueryBytes) most /= 2;
  return most;
}

template <int kRows>
void attend_rows(const Attend& p, Stream stream) {
  const int rows = p.tokens * (p.heads / p.kv_heads);
  launch<attend_kernel<kRows>>(kSetDecode, "decode",
                               static_cast<int64_t>(p.batch) * p.splits * p.kv_heads * ceil_div(rows, kRows),
                               kThreads, sizeof(AttendShared<kRows>) + sizeof(float) * kRows * p.dim, stream, p,
                               true);
}

template <int kType, int kRows>
void project_rows(const Project& p, Stream stream) {
  const size_t of_x = p.transposed ? sizeof(float) * kRows * p.columns : 0;
  launch<project_kernel<kType, kRows>>(
      kSetDecode, "decode projection", ceil_div(p.count * (p.heads / p.kv_heads), kRows) * project_parts(p) * p.kv_heads, kThreads,
      sizeof(ProjectShared<kRows>) + of_x, stream, p, true);
}

template <int kType>
void project_type(const Project& p, Stream stream) {
  switch (rows_of_block(p.count * (p.heads / p.kv_heads), p.transposed ? p.columns : 1)) {
    case 1:
      return project_rows<kType, 1>(p, stream);
    case 2:
      return project_rows<kType, 2>(p, stream);
    case 4:
      return project_rows<kType, 4>(p, stream);
    default:
      return project_rows<kType, 8>(p, stream);
  }
}

}  // namespace

void attend(const Attend& p, Stream stream) {
  switch (rows_of_block(p.tokens * (p.heads / p.kv_heads), p.dim)) {
    case 1:
      attend_rows<1>(p, stream);
      break;
    case 2:
      attend_rows<2>(p, stream);
      break;
    case 4:
      attend_rows<4>(p, stream);
      break;
    default:
      attend_rows<8>(p, stream);
  }
  const int64_t quarters = static_cast<int64_t>(p.batch) * p.tokens * p.heads * (p.dim_value / 4);
  launch<combine_kernel>(kSetDecode, "decode combination", ceil_div(quarters, kThreads), kThreads, 0, stream, p, true);
}

void project(const Project& p, Stream stream) {
  if (p.type == kFloat32)
    project_type<kFloat32>(p, stream);
  else if (p.type == kFloat16)
    project_type<kFloat16>(p, stream);
  else
    project_type<kBFloat16>(p, stream);
}

}  // namespace decode
}  // namespace retro_kernels
