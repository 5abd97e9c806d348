#include "forward.cuh"

#include "../device.h"
#include "kernels.h"
#include "tensor_map.h"

namespace retro_kernels {
namespace sm90 {
namespace {

template <class T, int kDim>
void run(const Forward& given, Stream stream) {
  Forward f = given;
  f.blocks = static_cast<int>(std::min<int64_t>(ceil_div(f.items, Shape<kDim>::kConsumers), multiprocessors()));
  launch<forward_kernel<T, kDim>>(kSetSm90, "attention forward (sm_90a)", f.blocks, Shape<kDim>::kThreads,
                                  Channel<kDim>::kBytes, stream, f);
}

}  // namespace

const char* forward(const Problem& p, Stream stream) {
  Forward f{};
  f.p = p;
  const int64_t rows = p.grouping == kClock ? p.stride : p.tokens;
  if (const char* reason = not_taken(p, rows, kRows)) return reason;
  f.box_rows = static_cast<int>(std::min<int64_t>(rows, kRows));
  f.row_tiles = static_cast<int>(ceil_div(rows, kRows));
  const int64_t groups = p.grouping == kClock ? p.groups : static_cast<int64_t>(p.chunks) * p.query_neighbours;
  const int64_t items = p.batch * groups * f.row_tiles * p.heads;
  if (items > INT32_MAX / 2) return kTooMany;
  f.items = static_cast<int>(items);
  if (!map_queries(f.query, p, p.query, p.query_stride, f.box_rows) ||
      !map_queries(f.out, p, p.out, p.out_stride, f.box_rows) ||
      !map_keys(f.key, p, p.key, p.key_stride, kSlots) || !map_keys(f.value, p, p.value, p.value_stride, kSlots))
    return kUnwalkable;
  if (p.type == kBFloat16)
    p.dim <= 64 ? run<BFloat16, 64>(f, stream) : run<BFloat16, 128>(f, stream);
  else
    p.dim <= 64 ? run<Float16, 64>(f, stream) : run<Float16, 128>(f, stream);
  return nullptr;
}

}  // namespace sm90
}  // namespace retro_kernels
