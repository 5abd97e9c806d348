#include "absorbed.cuh"

#include "../device.h"
#include "kernels.h"
#include "tensor_map.h"

namespace retro_kernels {
namespace sm90 {
namespace {

bool map_states(TensorMap& map, const Problem& p, const States& s, int box_tokens) {
  const Strides& stride = s.encoded_stride;
  if (!folds(stride, p.batch, p.chunks)) return false;
  Axis axes[5] = {{s.width, 1}, {1, 0}, {p.retrieved, stride.token}, {p.neighbours, stride.neighbour},
                  folded(stride, p.batch, p.chunks)};
  return make_map(map, s.encoded, axes, box_tokens);
}

bool map_weight(TensorMap& map, const Problem& p, const void* data, const int64_t (&stride)[2], int width) {
  Axis axes[5] = {{width, 1}, {p.kv_heads, stride[0]}, {p.dim, stride[1]}, {1, 0}, {1, 0}};
  return make_map(map, data, axes, p.dim <= 64 ? 64 : 128);
}

template <class T, int kDim, int kStateRows>
void run(const Absorbed& given, Stream stream) {
  Absorbed f = given;
  using S = AbsorbedShape<kDim, kStateRows>;
  constexpr auto kernel = absorbed_kernel<T, kDim, kStateRows>;
  constexpr const char* name = "absorbed forward (sm_90a)";
  f.blocks = std::min(f.items, multiprocessors());
  if (f.cluster > 1) {  // a cluster more than run at a time would begin when the others have ended
    const int clusters = clusters_at_a_time<kernel>(name, S::kThreads, S::kBytes, f.cluster);
    if (clusters == 0) f.cluster = 1;
    else f.blocks = f.cluster * std::min(f.items / f.cluster, clusters);
  }
  launch<kernel>(kSetSm90, name, f.blocks, S::kThreads, S::kBytes, stream, f, false, f.cluster);
}

template <class T>
void by_size(const Absorbed& f, Stream stream) {
  const bool few = f.p.neighbours * f.p.retrieved <= 128;
  if (f.p.dim <= 64)
    few ? run<T, 64, 128>(f, stream) : run<T, 64, 256>(f, stream);
  else
    few ? run<T, 128, 128>(f, stream) : run<T, 128, 256>(f, stream);
}

// As many blocks share a chunk's states as their pairs of heads fill evenly and as there are boxes of whole swizzled
// blocks of 8 tokens to divide among them.
void choose_cluster(Absorbed& f) {
  const Problem& p = f.p;
  const int pairs = (p.heads + 1) / 2;
  for (const int cluster : {4, 2, 1})
    for (const int parts : {1, 2, 4})  // of a neighbour
      if (pairs % cluster == 0 && p.retrieved % (8 * parts) == 0 && p.neighbours * parts % cluster == 0) {
        f.cluster = cluster, f.state_box = p.retrieved / parts;
        return;
      }
}

}  // namespace

const char* absorbed_forward(const Problem& p, const States& s, Stream stream) {
  Absorbed f{};
  f.p = p, f.width = s.width;
  const int64_t slots = static_cast<int64_t>(p.neighbours) * p.retrieved;
  if (p.stride > kRows && p.stride % kRows) return "a stride above 64 that is no multiple of 64";
  if (slots == 0 || p.chunks == 0 || s.width == 0) return "states of no size";
  if (slots > kMostStates) return "more than 256 states in a chunk";
  if (p.retrieved % 8) return "neighbours whose tokens are no multiple of 8";
  f.box_rows = std::min(p.stride, kRows);
  f.row_tiles = static_cast<int>(ceil_div(p.stride, kRows));
  const int64_t items = static_cast<int64_t>(p.batch) * p.groups * f.row_tiles * ((p.heads + 1) / 2);
  if (items > INT32_MAX / 2 || p.first_token < INT32_MIN / 2 || p.first_token > INT32_MAX / 2)
    return "more than 2^30 tiles of rows, or tokens that far away";
  f.items = static_cast<int>(items);
  choose_cluster(f);
  if (!map_queries(f.query, p, p.query, p.query_stride, f.box_rows) ||
      !map_queries(f.out, p, p.out, p.out_stride, f.box_rows) || !map_states(f.encoded, p, s, f.state_box) ||
      !map_weight(f.w_key, p, s.w_key, s.w_key_stride, s.width) ||
      !map_weight(f.w_value, p, s.w_value, s.w_value_stride, s.width))
    return "tensors that the copy engine cannot walk: sequences and chunks must lie at one distance, no axis expanded";
  p.type == kBFloat16 ? by_size<BFloat16>(f, stream) : by_size<Float16>(f, stream);
  return nullptr;
}

}  // namespace sm90
}  // namespace retro_kernels
