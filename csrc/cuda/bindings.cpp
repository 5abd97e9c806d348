// The raw operations of the CUDA backend, through torch's stable ABI: every output is an argument, so that Python
// allocates it. They check what would otherwise corrupt memory; what a user can get wrong is checked in api.py.
// Compiled a second time with RK_EMULATED, for CPU tensors and the emulator.
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <string>
#include <tuple>

#include "arguments.h"
#include "device.h"
#include "sm80/kernels.h"
#include "sm90/kernels.h"

namespace retro_kernels {
namespace {

int64_t floor_div(int64_t a, int64_t b) { return a / b - (a % b != 0 && (a < 0) != (b < 0)); }

int small(int64_t size, const char* name) {
  STD_TORCH_CHECK(size >= 0 && size <= INT32_MAX, name, " is ", size, ", and must be below 2^31");
  return static_cast<int>(size);
}

Problem make_problem(const Tensor& query, const Tensor& key, const Tensor& value, const MaybeTensor& mask,
                     const MaybeTensor& chunk_spans, int64_t grouping, double scale, int64_t stride,
                     int64_t first_token) {
  Problem p{};
  STD_TORCH_CHECK(grouping >= kClock && grouping <= kChunk, "grouping must be 0, 1 or 2, got ", grouping);
  p.grouping = static_cast<Grouping>(grouping);
  STD_TORCH_CHECK(query.dim() == 6 && key.dim() == 6 && value.dim() == 6, "query, key and value must have 6 dimensions");
  p.batch = small(query.size(0), "batch"), p.query_neighbours = small(query.size(2), "query.shape[2]");
  p.tokens = small(query.size(3), "query.shape[3]"), p.heads = small(query.size(4), "heads");
  p.dim = small(query.size(5), "dim");
  p.chunks = small(key.size(1), "chunks"), p.neighbours = small(key.size(2), "neighbours");
  p.retrieved = small(key.size(3), "retrieved tokens"), p.kv_heads = small(key.size(4), "key/value heads");
  p.by_tokens = divisor(p.tokens), p.by_retrieved = divisor(p.retrieved);
  check_shape(key, "key", {p.batch, p.chunks, p.neighbours, p.retrieved, p.kv_heads, p.dim});
  check_shape(value, "value", {p.batch, p.chunks, p.neighbours, p.retrieved, p.kv_heads, p.dim});
  STD_TORCH_CHECK(p.dim == 64 || p.dim == 96 || p.dim == 128, "head size must be 64, 96 or 128, got ", p.dim);
  STD_TORCH_CHECK(p.kv_heads >= 1 && p.heads % p.kv_heads == 0, "query has ", p.heads, " heads and key ", p.kv_heads);
  p.stride = p.tokens;
  if (p.grouping == kClock) {
    STD_TORCH_CHECK(query.size(1) == 1 && p.query_neighbours == 1, "grouping CLOCK needs query [b, 1, 1, n, h, d]");
    STD_TORCH_CHECK(stride >= 1, "stride must be at least 1, got ", stride);
    p.stride = small(stride, "stride"), p.first_token = first_token;
  } else if (p.grouping == kNeighbour) {
    STD_TORCH_CHECK(query.size(1) == p.chunks && p.query_neighbours == p.neighbours && p.tokens == p.retrieved,
                    "grouping NEIGHBOUR needs query and key of the same [b, l, k, r]");
  } else {
    STD_TORCH_CHECK(query.size(1) == p.chunks && p.neighbours == 1, "grouping CHUNK needs key [b, l, 1, r, hk, d]");
  }
  small(static_cast<int64_t>(p.tokens) * p.query_neighbours, "rows of a group");
  STD_TORCH_CHECK(static_cast<int64_t>(p.neighbours) * p.retrieved <= kMostSlots, "a group has ",
                  static_cast<int64_t>(p.neighbours) * p.retrieved, " slots, at most ", kMostSlots, " are taken");
  p.type = half_type(query, "query");
  STD_TORCH_CHECK(half_type(key, "key") == p.type && half_type(value, "value") == p.type,
                  "query, key and value must have one dtype");
  p.scale = static_cast<float>(scale);
  for (const auto& [tensor, name] : {std::pair(&query, "query"), std::pair(&key, "key"), std::pair(&value, "value")}) {
    check_device(*tensor, name, query);
    check_rows(*tensor, name);
  }
  p.query = static_cast<const uint16_t*>(address(query)), p.query_stride = strides_of(query);
  p.key = static_cast<const uint16_t*>(address(key)), p.key_stride = strides_of(key);
  p.value = static_cast<const uint16_t*>(address(value)), p.value_stride = strides_of(value);
  if (mask) {
    check_device(*mask, "mask", query);
    check_shape(*mask, "mask", {p.batch, p.chunks, p.neighbours, p.retrieved});
    STD_TORCH_CHECK(mask->scalar_type() == ScalarType::Bool, "mask must be bool");
    p.mask = static_cast<const uint8_t*>(address(*mask)), p.mask_stride = strides_of(*mask);
  }
  if (chunk_spans) {
    check_device(*chunk_spans, "chunk_spans", query);
    STD_TORCH_CHECK(p.grouping == kClock, "chunk_spans needs grouping CLOCK");
    check_shape(*chunk_spans, "chunk_spans", {p.batch, p.chunks, 2});
    STD_TORCH_CHECK(chunk_spans->scalar_type() == ScalarType::Int && chunk_spans->is_contiguous(),
                    "chunk_spans must be int32 and contiguous");
    p.chunk_spans = static_cast<const int32_t*>(address(*chunk_spans));
  }
  return p;
}

// The groups to compute (see common/group.cuh): those with rows, or all that have rows or slots.
void set_groups(Problem& p, bool all) {
  p.first_group = 0;
  p.groups = p.grouping == kNeighbour ? small(static_cast<int64_t>(p.chunks) * p.neighbours, "neighbours") : p.chunks;
  if (p.grouping != kClock || p.chunk_spans) return;
  int64_t first = floor_div(-p.first_token, p.stride), end = floor_div(p.tokens - 1 - p.first_token, p.stride) + 1;
  if (p.tokens == 0) first = end = 0;
  if (all) first = std::min<int64_t>(first, 0), end = std::max<int64_t>(end, p.chunks);
  p.first_group = static_cast<int>(first), p.groups = small(end - first, "groups");
}

void set_results(Problem& p, const Tensor& query, const Tensor& out, const Tensor& lse) {
  check_shape(out, "out", {p.batch, query.size(1), p.query_neighbours, p.tokens, p.heads, p.dim});
  check_shape(lse, "lse", {p.batch, query.size(1), p.query_neighbours, p.tokens, p.heads});
  check_device(out, "out", query), check_device(lse, "lse", query), check_rows(out, "out");
  STD_TORCH_CHECK(half_type(out, "out") == p.type && lse.scalar_type() == ScalarType::Float,
                  "out must have the query's dtype and lse float32");
  p.out_stride = strides_of(out), p.lse_stride = strides_of(lse);
}

// Tokens in no span belong to no group: with chunk_spans the caller has set out to 0 and lse to -inf.
void forward(Tensor query, Tensor key, Tensor value, MaybeTensor mask, MaybeTensor chunk_spans, int64_t grouping,
             double scale, int64_t stride, int64_t first_token, Tensor out, Tensor lse) {
  Problem p = make_problem(query, key, value, mask, chunk_spans, grouping, scale, stride, first_token);
  set_results(p, query, out, lse);
  p.out = static_cast<uint16_t*>(output(out, "out"));
  p.lse = static_cast<float*>(output(lse, "lse"));
  if (lse.numel() == 0) return;
  set_groups(p, false);
  const OnDevice device(query);
#if defined(RK_HAVE_SM90)
  if (chosen_kernels() == kSm90) {
    const char* refused = sm90::forward(p, device.stream());
    if (refused == nullptr) return;
    STD_TORCH_CHECK(!only_chosen_kernels(), "the kernels \"sm90 only\" do not take ", refused);
  }
#endif
  sm80::forward(p, device.stream());
}

// `key` and `value` are the shapes of what is never made, expanded from one row.
void absorbed_forward(Tensor query, Tensor key, Tensor value, MaybeTensor mask, double scale, int64_t stride,
                      int64_t first_token, Tensor encoded, Tensor w_key, Tensor w_value, Tensor out, Tensor lse) {
#if defined(RK_HAVE_SM90)
  Problem p = make_problem(query, key, value, mask, std::nullopt, kClock, scale, stride, first_token);
  set_results(p, query, out, lse);
  p.out = static_cast<uint16_t*>(output(out, "out"));
  p.lse = static_cast<float*>(output(lse, "lse"));
  STD_TORCH_CHECK(encoded.dim() == 5 && w_key.dim() == 3, "encoded must have 5 dimensions and w_key 3");
  const int width = small(encoded.size(4), "encoded.shape[4]");
  check_shape(encoded, "encoded", {p.batch, p.chunks, p.neighbours, p.retrieved, width});
  check_shape(w_key, "w_key", {p.kv_heads, p.dim, width});
  check_shape(w_value, "w_value", {p.kv_heads, p.dim, width});
  STD_TORCH_CHECK(width % 8 == 0, "encoded.shape[4] must be a multiple of 8, got ", width);
  for (const auto& [tensor, name] :
       {std::pair(&encoded, "encoded"), std::pair(&w_key, "w_key"), std::pair(&w_value, "w_value")}) {
    check_device(*tensor, name, query);
    check_rows(*tensor, name);
    STD_TORCH_CHECK(half_type(*tensor, name) == p.type, name, " must have the query's dtype");
  }
  const sm90::States states{width,
                            address(encoded),
                            address(w_key),
                            address(w_value),
                            strides_of(encoded),
                            {w_key.stride(0), w_key.stride(1)},
                            {w_value.stride(0), w_value.stride(1)}};
  if (lse.numel() == 0) return;
  set_groups(p, false);
  const OnDevice device(query);
  STD_TORCH_CHECK(compute_capability() == 90 || compute_capability() == 0,
                  "the absorbed kernel runs on compute capability 9.0 only");
  const char* refused = sm90::absorbed_forward(p, states, device.stream());
  STD_TORCH_CHECK(refused == nullptr, "the absorbed kernel does not take ", refused);
#else
  STD_TORCH_CHECK(false, "this library was built without sm_90a, which the absorbed kernel needs");
#endif
}

// With chunk_spans the caller has set grad_query to 0.
void backward(Tensor grad_out, MaybeTensor grad_lse, Tensor query, Tensor key, Tensor value, MaybeTensor mask, MaybeTensor chunk_spans,
              Tensor out, Tensor lse, int64_t grouping, double scale, int64_t stride, int64_t first_token,
              Tensor grad_query, Tensor grad_key, Tensor grad_value) {
  Problem p = make_problem(query, key, value, mask, chunk_spans, grouping, scale, stride, first_token);
  set_results(p, query, out, lse);
  p.out = static_cast<uint16_t*>(const_cast<void*>(address(out)));
  p.lse = static_cast<float*>(const_cast<void*>(address(lse)));
  check_shape(grad_out, "grad_out", {p.batch, query.size(1), p.query_neighbours, p.tokens, p.heads, p.dim});
  check_device(grad_out, "grad_out", query), check_rows(grad_out, "grad_out");
  STD_TORCH_CHECK(half_type(grad_out, "grad_out") == p.type, "grad_out must have the query's dtype");
  p.grad_out = static_cast<const uint16_t*>(address(grad_out)), p.grad_out_stride = strides_of(grad_out);
  if (grad_lse) {
    check_shape(*grad_lse, "grad_lse", {p.batch, query.size(1), p.query_neighbours, p.tokens, p.heads});
    check_device(*grad_lse, "grad_lse", query);
    STD_TORCH_CHECK(grad_lse->scalar_type() == ScalarType::Float && grad_lse->is_contiguous() && lse.is_contiguous(),
                    "grad_lse must be float32, and lie contiguously as lse");
    p.grad_lse = static_cast<const float*>(address(*grad_lse));
  }
  check_shape(grad_query, "grad_query", {p.batch, query.size(1), p.query_neighbours, p.tokens, p.heads, p.dim});
  check_shape(grad_key, "grad_key", {p.batch, p.chunks, p.neighbours, p.retrieved, p.kv_heads, p.dim});
  check_shape(grad_value, "grad_value", {p.batch, p.chunks, p.neighbours, p.retrieved, p.kv_heads, p.dim});
  const auto gradient = [&](const Tensor& t, const char* name, uint16_t*& data, Strides& strides) {
    check_device(t, name, query), check_rows(t, name);
    STD_TORCH_CHECK(half_type(t, name) == p.type, name, " must have the query's dtype");
    data = static_cast<uint16_t*>(output(t, name)), strides = strides_of(t);
  };
  gradient(grad_query, "grad_query", p.grad_query, p.grad_query_stride);
  gradient(grad_key, "grad_key", p.grad_key, p.grad_key_stride);
  gradient(grad_value, "grad_value", p.grad_value, p.grad_value_stride);
  set_groups(p, true);
  const OnDevice device(query);
#if defined(RK_HAVE_SM90)
  if (chosen_kernels() == kSm90) {
    const char* refused = sm90::backward(p, device.stream());
    if (refused == nullptr) return;
    STD_TORCH_CHECK(!only_chosen_kernels(), "the kernels \"sm90 only\" do not take ", refused);
  }
#endif
  sm80::backward(p, device.stream());
}

void set_kernels(std::string name) { choose_kernels(name); }
std::string kernels() { return chosen_kernels() == kSm90 ? "sm90" : "sm80"; }

// Launches since the last question: of sm80's, sm90's and decode's kernels, and how many of all may overlap.
std::tuple<int64_t, int64_t, int64_t, int64_t> launches() {
  return {launches_of[kSetSm80].exchange(0), launches_of[kSetSm90].exchange(0), launches_of[kSetDecode].exchange(0),
          launches_that_overlap.exchange(0)};
}

}  // namespace
}  // namespace retro_kernels

#define RK_SLOTS "Tensor query, Tensor key, Tensor value, Tensor? mask, Tensor? chunk_spans, "
#define RK_SETTINGS "int grouping, float scale, int stride, int first_token, "

RK_DEFINE(m) {
  m.def("attention_forward(" RK_SLOTS RK_SETTINGS "Tensor(a!) out, Tensor(b!) lse) -> ()");
  m.def("attention_backward(Tensor grad_out, Tensor? grad_lse, " RK_SLOTS "Tensor out, Tensor lse, " RK_SETTINGS
        "Tensor(a!) grad_query, Tensor(b!) grad_key, Tensor(c!) grad_value) -> ()");
  m.def(
      "absorbed_forward(Tensor query, Tensor key, Tensor value, Tensor? mask, float scale, int stride, int first_token, "
      "Tensor encoded, Tensor w_key, Tensor w_value, Tensor(a!) out, Tensor(b!) lse) -> ()");
  m.def("kernels() -> str");
  m.def("set_kernels(str name) -> ()");
  m.def("launches() -> (int sm80, int sm90, int decode, int overlapping)");
}

RK_IMPLEMENT(m) {
  m.impl("attention_forward", TORCH_BOX(&retro_kernels::forward));
  m.impl("absorbed_forward", TORCH_BOX(&retro_kernels::absorbed_forward));
  m.impl("attention_backward", TORCH_BOX(&retro_kernels::backward));
}

RK_IMPLEMENT_ANYWHERE(m) {
  m.impl("kernels", TORCH_BOX(&retro_kernels::kernels));
  m.impl("set_kernels", TORCH_BOX(&retro_kernels::set_kernels));
  m.impl("launches", TORCH_BOX(&retro_kernels::launches));
}
