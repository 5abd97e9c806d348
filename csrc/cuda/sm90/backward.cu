#include "backward.cuh"

#include "../device.h"
#include "kernels.h"
#include "tensor_map.h"

namespace retro_kernels {
namespace sm90 {
namespace {

template <class T, int kDim, int kPasses>
void run(const Backward& given, Stream stream) {
  Backward f = given;
  using S = BackwardShape<kDim>;
  f.blocks = static_cast<int>(std::min<int64_t>(ceil_div(f.items, S::kChannels), multiprocessors()));
  launch<backward_kernel<T, kDim, kPasses>>(kSetSm90, "attention backward (sm_90a)", f.blocks, S::kThreads, S::kBytes,
                                            stream, f);
}

template <class T, int kDim>
void by_passes(const Backward& f, Stream stream) {
  const Problem& p = f.p;
  if (f.row_blocks == 1)
    run<T, kDim, kOneBlock>(f, stream);
  else if (p.grouping != kClock && p.retrieved <= kSlots)
    run<T, kDim, kOneTile>(f, stream);
  else
    run<T, kDim, kTwoSweeps>(f, stream);
}

template <class T>
void by_dim(const Backward& f, Stream stream) {
  f.p.dim <= 64 ? by_passes<T, 64>(f, stream) : by_passes<T, 128>(f, stream);
}

}  // namespace

const char* backward(const Problem& p, Stream stream) {
  Backward f{};
  f.p = p;
  const int64_t rows = p.grouping == kClock ? p.stride : p.tokens;
  if (const char* reason = not_taken(p, rows, kRows)) return reason;
  f.box_rows = static_cast<int>(std::min<int64_t>(rows, kRows));
  f.row_tiles = static_cast<int>(ceil_div(rows, kRows));
  const int64_t blocks = static_cast<int64_t>(f.row_tiles) * (p.grouping == kChunk ? p.query_neighbours : 1) *
                         (p.heads / p.kv_heads);
  const int64_t items = static_cast<int64_t>(p.batch) * p.groups * p.kv_heads;
  if (items > INT32_MAX / 2 || blocks > INT32_MAX / 2) return kTooMany;
  f.items = static_cast<int>(items), f.row_blocks = static_cast<int>(blocks);
  if (!map_queries(f.query, p, p.query, p.query_stride, f.box_rows) ||
      !map_queries(f.out, p, p.out, p.out_stride, f.box_rows) ||
      !map_queries(f.grad_out, p, p.grad_out, p.grad_out_stride, f.box_rows) ||
      !map_queries(f.grad_query, p, p.grad_query, p.grad_query_stride, f.box_rows) ||
      !map_keys(f.key, p, p.key, p.key_stride, kSlots) || !map_keys(f.value, p, p.value, p.value_stride, kSlots) ||
      !map_keys(f.grad_key, p, p.grad_key, p.grad_key_stride, kSlots) ||
      !map_keys(f.grad_value, p, p.grad_value, p.grad_value_stride, kSlots))
    return kUnwalkable;
  p.type == kBFloat16 ? by_dim<BFloat16>(f, stream) : by_dim<Float16>(f, stream);
  return nullptr;
}

}  // namespace sm90
}  // namespace retro_kernels
