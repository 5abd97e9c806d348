#include "backward.cuh"

#include "kernels.h"

namespace retro_kernels {
namespace sm80 {
namespace {

template <class T, int DIM, int ROWS, int KEYS, bool ONE_BLOCK>
void run(const Problem& p, Stream stream) {
  using Shape = BackwardShape<DIM, ROWS, KEYS>;
  launch<attention_backward<T, DIM, ROWS, KEYS, ONE_BLOCK>>(
      kSetSm80, "attention backward (sm_80)", static_cast<int64_t>(p.batch) * p.groups * p.kv_heads, Shape::kThreads,
      Shape::shared_bytes(slots_of_group(p)), stream, p);
}

template <class T, int DIM>
void by_rows(const Problem& p, Stream stream) {
  const int64_t rows = p.grouping == kClock ? p.stride : static_cast<int64_t>(p.tokens) * p.query_neighbours;
  const bool fits = BackwardShape<DIM, 128, 32>::shared_bytes(slots_of_group(p)) <= kMostShared;
  if (p.heads != p.kv_heads || rows > 128 || (rows > 64 && !fits))
    run<T, DIM, 64, 64, false>(p, stream);
  else if (rows > 64)
    run<T, DIM, 128, 32, true>(p, stream);
  else
    run<T, DIM, 64, 64, true>(p, stream);
}

template <class T>
void by_dim(const Problem& p, Stream stream) {
  p.dim == 64 ? by_rows<T, 64>(p, stream) : p.dim == 96 ? by_rows<T, 96>(p, stream) : by_rows<T, 128>(p, stream);
}

}  // namespace

void backward(const Problem& p, Stream stream) {
  p.type == kBFloat16 ? by_dim<BFloat16>(p, stream) : by_dim<Float16>(p, stream);
}

}  // namespace sm80
}  // namespace retro_kernels
