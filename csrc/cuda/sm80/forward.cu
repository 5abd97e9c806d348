#include "forward.cuh"

#include "kernels.h"

namespace retro_kernels {
namespace sm80 {
namespace {

template <class T, int DIM, int WARPS>
void run(const Problem& p, Stream stream) {
  using Shape = ForwardShape<DIM, WARPS>;
  const int64_t rows = p.grouping == kClock ? p.stride : static_cast<int64_t>(p.tokens) * p.query_neighbours;
  launch<attention_forward<T, DIM, WARPS>>(
      kSetSm80, "attention forward (sm_80)",
      static_cast<int64_t>(p.batch) * p.groups * ceil_div(rows, Shape::kRows) * p.heads, Shape::kThreads,
      Shape::shared_bytes(slots_of_group(p)), stream, p);
}

template <class T, int DIM>
void by_rows(const Problem& p, Stream stream) {
  const int64_t rows = p.grouping == kClock ? p.stride : static_cast<int64_t>(p.tokens) * p.query_neighbours;
  if (rows <= 64 || ForwardShape<DIM, 8>::shared_bytes(slots_of_group(p)) > kMostShared)
    run<T, DIM, 4>(p, stream);
  else
    run<T, DIM, 8>(p, stream);
}

template <class T>
void by_dim(const Problem& p, Stream stream) {
  p.dim == 64 ? by_rows<T, 64>(p, stream) : p.dim == 96 ? by_rows<T, 96>(p, stream) : by_rows<T, 128>(p, stream);
}

}  // namespace

void forward(const Problem& p, Stream stream) {
  p.type == kBFloat16 ? by_dim<BFloat16>(p, stream) : by_dim<Float16>(p, stream);
}

}  // namespace sm80
}  // namespace retro_kernels
