// The raw decode operation of the CPU backend; see bindings.cpp.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <vector>

#include "arguments.h"
#include "decode_problem.h"
#include "dispatch.h"

namespace retro_kernels {
namespace {

CacheType cache_type(const Tensor& t, const char* name, Type type) {
  if (t.scalar_type() == ScalarType::Char) return kCacheInt8;
  if (t.scalar_type() == ScalarType::Float8_e4m3fn) return kCacheFloat8;
  STD_TORCH_CHECK(type_of(t, name) == type, name, " must have the query's dtype, or be int8 or float8_e4m3fn");
  return static_cast<CacheType>(type);
}

const float* floats(const MaybeTensor& t, const char* name, std::initializer_list<int64_t> shape, bool contiguous) {
  if (!t) return nullptr;
  check_shape(*t, name, shape);
  STD_TORCH_CHECK(t->scalar_type() == ScalarType::Float && (!contiguous || t->is_contiguous()), name,
                  " must be float32", contiguous ? " and contiguous" : "");
  static const float nothing = 0.0f;
  return t->numel() ? static_cast<const float*>(t->const_data_ptr()) : &nothing;
}

const int64_t* integers64(const Tensor& t, const char* name, int64_t size) {
  check_shape(t, name, {size});
  STD_TORCH_CHECK(t.scalar_type() == ScalarType::Long && t.is_contiguous(), name, " must be int64 and contiguous");
  return t.numel() ? static_cast<const int64_t*>(t.const_data_ptr()) : nullptr;
}

int64_t floor_divide(int64_t x, int64_t by) { return x >= 0 ? x / by : -((by - 1 - x) / by); }

#define RK_DECODE_ARGUMENTS                                                                                       \
  Tensor query, Tensor key, Tensor value, MaybeTensor mask, MaybeTensor logit_bias, MaybeTensor null_logit,      \
      MaybeTensor null_value, MaybeTensor key_cos, MaybeTensor key_sin, MaybeTensor key_scale,                   \
      MaybeTensor value_scale, Tensor position, MaybeTensor valid, MaybeTensor chunk, bool interleaved,          \
      double scale, double softcap, int64_t chunk_size

// How many ranges of slots there will be: what `partial` must have room for.
int64_t make_decode_problem(DecodeProblem& p, Tensor query, Tensor key, Tensor value, MaybeTensor key_cos) {
  STD_TORCH_CHECK(query.dim() == 4 && key.dim() == 5 && value.dim() == 5,
                  "query must have 4 dimensions, key and value 5");
  p.batch = query.size(0), p.tokens = query.size(1), p.heads = query.size(2), p.dim = query.size(3);
  p.neighbours = key.size(1), p.retrieved = key.size(2), p.kv_heads = key.size(3), p.dim_value = value.size(4);
  p.slots = p.neighbours * p.retrieved;
  check_shape(key, "key", {p.batch, p.neighbours, p.retrieved, p.kv_heads, p.dim});
  check_shape(value, "value", {p.batch, p.neighbours, p.retrieved, p.kv_heads, p.dim_value});
  STD_TORCH_CHECK(query.is_cpu(), "query must be on the CPU");
  STD_TORCH_CHECK(p.dim >= 1 && p.dim <= 4096 && p.dim_value >= 1 && p.dim_value <= 4096,
                  "head sizes must be in [1, 4096], got ", p.dim, " and ", p.dim_value);
  STD_TORCH_CHECK(p.kv_heads >= 1 && p.heads % p.kv_heads == 0, "query has ", p.heads, " heads and key ", p.kv_heads);
  check_last_stride(query, "query");
  check_last_stride(key, "key");
  check_last_stride(value, "value");
  p.type = type_of(query, "query");
  p.key_type = cache_type(key, "key", p.type);
  p.value_type = cache_type(value, "value", p.type);
  p.query = query.numel() ? query.const_data_ptr() : nullptr;
  p.key = key.numel() ? key.const_data_ptr() : nullptr;
  p.value = value.numel() ? value.const_data_ptr() : nullptr;
  for (int i = 0; i < 3; ++i) p.query_stride[i] = query.stride(i);
  p.shared = p.key == p.value && p.dim == p.dim_value && p.key_type == p.value_type && !key_cos;
  for (int i = 0; i < 4; ++i) {
    p.key_stride[i] = key.stride(i), p.value_stride[i] = value.stride(i);
    p.shared = p.shared && p.key_stride[i] == p.value_stride[i];
  }
  if (key_cos) {
    STD_TORCH_CHECK(key_cos->dim() == 2, "key_cos must have 2 dimensions, has ", key_cos->dim());
    p.rotary_width = key_cos->size(1);
    STD_TORCH_CHECK(2 * p.rotary_width <= p.dim && p.rotary_width <= 128, "rotary tables of width ", p.rotary_width,
                    " do not fit head size ", p.dim);
  }
  level().decode.plan(p);
  return p.splits;
}

int64_t decode_splits(Tensor query, Tensor key, Tensor value, MaybeTensor key_cos) {
  DecodeProblem p{};
  return make_decode_problem(p, query, key, value, key_cos);
}

void decode(RK_DECODE_ARGUMENTS, Tensor out, Tensor lse, MaybeTensor partial) {
  DecodeProblem p{};
  make_decode_problem(p, query, key, value, key_cos);
  const int64_t b = p.batch, t = p.tokens, h = p.heads, k = p.neighbours, r = p.retrieved;
  STD_TORCH_CHECK(chunk_size >= 1, "chunk_size must be at least 1, got ", chunk_size);
  p.scale = static_cast<float>(scale);
  STD_TORCH_CHECK(softcap >= 0 && std::isfinite(softcap), "softcap must be 0 or positive and finite, got ", softcap);
  p.softcap = static_cast<float>(softcap);
  p.rotary_interleaved = interleaved;
  if (mask) {
    check_shape(*mask, "mask", {b, k, r});
    STD_TORCH_CHECK(mask->scalar_type() == ScalarType::Bool, "mask must be bool");
    p.mask = mask->numel() ? static_cast<const uint8_t*>(mask->const_data_ptr()) : nullptr;
    for (int i = 0; i < 3; ++i) p.mask_stride[i] = mask->stride(i);
  }
  if (logit_bias) {
    STD_TORCH_CHECK(logit_bias->dim() == 4, "logit_bias must have 4 dimensions, has ", logit_bias->dim());
    p.bias_slots = logit_bias->size(3);
    STD_TORCH_CHECK(p.bias_slots == r || p.bias_slots == k * r, "logit_bias.shape[3] must be r or k * r, got ",
                    p.bias_slots);
    p.logit_bias = floats(logit_bias, "logit_bias", {b, t, h, p.bias_slots}, true);
  }
  p.null_logit = floats(null_logit, "null_logit", {b, t, h}, true);
  STD_TORCH_CHECK(!null_value || null_logit, "null_value needs null_logit");
  p.null_value = operand(null_value, "null_value", {h, p.dim_value});
  STD_TORCH_CHECK(!key_cos == !key_sin, "key_cos and key_sin must come together");
  if (key_cos) {
    p.key_cos = operand(key_cos, "key_cos", {r, p.rotary_width});
    p.key_sin = operand(key_sin, "key_sin", {r, p.rotary_width});
  }
  p.key_scale = floats(key_scale, "key_scale", {b, k, r}, false);
  p.value_scale = floats(value_scale, "value_scale", {b, k, r}, false);
  STD_TORCH_CHECK(!key_scale == (p.key_type < kCacheInt8) && !value_scale == (p.value_type < kCacheInt8),
                  "a cache has a scale exactly when it is int8 or float8_e4m3fn");
  for (int i = 0; i < 3; ++i) {
    if (key_scale) p.key_scale_stride[i] = key_scale->stride(i);
    if (value_scale) p.value_scale_stride[i] = value_scale->stride(i);
  }

  check_shape(out, "out", {b, t, h, p.dim_value});
  check_shape(lse, "lse", {b, t, h});
  STD_TORCH_CHECK(type_of(out, "out") == p.type && type_of(lse, "lse") == kFloat32,
                  "out must have the query's dtype and lse float32");
  p.out = output(out, "out");
  p.lse = static_cast<float*>(output(lse, "lse"));
  if (p.splits > 1) {
    STD_TORCH_CHECK(!!partial, "partial sums are needed for ", p.splits, " ranges of slots");
    check_shape(*partial, "partial", {p.splits, b, t, h, p.dim_value + 2});
    STD_TORCH_CHECK(partial->scalar_type() == ScalarType::Float, "partial must be float32");
    p.partial = static_cast<float*>(output(*partial, "partial"));
  }
  const int64_t* positions = integers64(position, "position", b);
  const int64_t* chunks = chunk ? integers64(*chunk, "chunk", b) : nullptr;
  const uint8_t* are_valid = nullptr;
  if (valid) {
    check_shape(*valid, "valid", {b});
    STD_TORCH_CHECK(valid->scalar_type() == ScalarType::Bool && valid->is_contiguous(),
                    "valid must be bool and contiguous");
    are_valid = valid->numel() ? static_cast<const uint8_t*>(valid->const_data_ptr()) : nullptr;
  }
  if (out.numel() == 0) return;

  // The states of ops/decoding/common.py: what is idle or beyond the border is written here.
  std::vector<uint8_t> attends(b * t);
  const int64_t row_bytes = p.dim_value * (p.type == kFloat32 ? 4 : 2);
  for (int64_t i = 0; i < b * t; ++i) {
    const int64_t first = positions[i / t] - (chunk_size - 1), since = first + i % t;
    const int64_t held = chunks ? chunks[i / t] : std::max<int64_t>(first, 0) / chunk_size;
    const bool counts = !are_valid || are_valid[i / t], before = since + chunk_size - 1 < 0;
    attends[i] = counts && since >= 0 && floor_divide(since, chunk_size) == held;
    if (attends[i]) continue;
    const bool idle = !counts || (since < 0 && !before);
    char* row = static_cast<char*>(p.out) + i * h * row_bytes;
    const uint32_t nan32 = 0x7fc00000u;
    const uint16_t nan16 = p.type == kFloat16 ? 0x7e00u : 0x7fc0u;
    for (int64_t j = 0; j < h * p.dim_value; ++j) {
      if (p.type == kFloat32)
        reinterpret_cast<uint32_t*>(row)[j] = idle ? 0u : nan32;
      else
        reinterpret_cast<uint16_t*>(row)[j] = idle ? 0u : nan16;
    }
    std::fill(p.lse + i * h, p.lse + (i + 1) * h, idle ? -INFINITY : NAN);
  }
  p.attends = attends.data();

  const DecodeLevel& chosen = level().decode;
  const size_t bytes = chosen.scratch_bytes(p);
  torch::stable::parallel_for(0, chosen.items(p), 1, [&](int64_t first, int64_t last) {
    chosen.attend(p, first, last, thread_scratch(bytes));
  });
  if (p.splits > 1)
    torch::stable::parallel_for(0, b * t * h, std::max<int64_t>(1, 16384 / p.dim_value), [&](int64_t first, int64_t last) {
      chosen.combine(p, first, last, thread_scratch(bytes));
    });
}

constexpr int64_t kProjectItems = 64;    // wanted, so that threads end together
constexpr int64_t kProjectColumns = 64;  // but not below this many columns each

void decode_project(Tensor x, Tensor weight, bool transposed, Tensor out) {
  STD_TORCH_CHECK(x.dim() == 3 && weight.dim() == 3, "x and weight must have 3 dimensions");
  ProjectProblem p{};
  p.transposed = transposed;
  p.tokens = x.size(0), p.heads = x.size(1), p.depth = x.size(2);
  p.kv_heads = weight.size(0), p.width = weight.size(transposed ? 1 : 2);
  STD_TORCH_CHECK(p.kv_heads >= 1 && p.heads % p.kv_heads == 0, "x has ", p.heads, " heads and weight ", p.kv_heads);
  check_shape(x, "x", {p.tokens, p.heads, p.depth});
  if (transposed)
    check_shape(weight, "weight", {p.kv_heads, p.width, p.depth});
  else
    check_shape(weight, "weight", {p.kv_heads, p.depth, p.width});
  check_shape(out, "out", {p.tokens, p.heads, p.width});
  check_last_stride(x, "x");
  check_last_stride(weight, "weight");
  p.type = type_of(x, "x");
  STD_TORCH_CHECK(type_of(weight, "weight") == p.type && type_of(out, "out") == p.type,
                  "x, weight and out must have one dtype");
  p.out = output(out, "out");
  if (out.numel() == 0) return;
  STD_TORCH_CHECK(p.depth >= 1, "there is nothing to add up");
  p.x = x.const_data_ptr();
  p.weight = weight.const_data_ptr();
  for (int i = 0; i < 2; ++i) p.x_stride[i] = x.stride(i), p.weight_stride[i] = weight.stride(i);
  const int64_t parts = std::max<int64_t>(1, std::min((kProjectItems + p.kv_heads - 1) / p.kv_heads, p.width / kProjectColumns));
  p.part = ((p.width + parts - 1) / parts + 15) / 16 * 16;
  p.parts = (p.width + p.part - 1) / p.part;

  const DecodeLevel& chosen = level().decode;
  const size_t bytes = chosen.project_scratch(p);
  torch::stable::parallel_for(0, p.kv_heads * p.parts, 1, [&](int64_t first, int64_t last) {
    chosen.project(p, first, last, thread_scratch(bytes));
  });
}

}  // namespace
}  // namespace retro_kernels

STABLE_TORCH_LIBRARY_FRAGMENT(retro_kernels_cpu, m) {
  m.def(
      "decode(Tensor query, Tensor key, Tensor value, Tensor? mask, Tensor? logit_bias, Tensor? null_logit, "
      "Tensor? null_value, Tensor? key_cos, Tensor? key_sin, Tensor? key_scale, Tensor? value_scale, Tensor position, "
      "Tensor? valid, Tensor? chunk, bool rotary_interleaved, float scale, float softcap, int chunk_size, "
      "Tensor(a!) out, Tensor(b!) lse, Tensor(c!)? partial) -> ()");
  m.def("decode_project(Tensor x, Tensor weight, bool transposed, Tensor(a!) out) -> ()");
  m.def("decode_splits(Tensor query, Tensor key, Tensor value, Tensor? key_cos) -> int");
}

STABLE_TORCH_LIBRARY_IMPL(retro_kernels_cpu, CPU, m) {
  m.impl("decode", TORCH_BOX(&retro_kernels::decode));
  m.impl("decode_project", TORCH_BOX(&retro_kernels::decode_project));
  m.impl("decode_splits", TORCH_BOX(&retro_kernels::decode_splits));
}
