// The raw decode operations of the CUDA backend; see bindings.cpp.
#include <torch/csrc/stable/library.h>

#include "arguments.h"
#include "decode/kernels.h"

namespace retro_kernels {
namespace {

using decode::Attend;
using decode::Project;
using decode::Type;

int small(int64_t size, const char* name) {
  STD_TORCH_CHECK(size >= 0 && size <= INT32_MAX, name, " is ", size, ", and must be below 2^31");
  return static_cast<int>(size);
}

Type number_type(const Tensor& t, const char* name) {
  switch (t.scalar_type()) {
    case ScalarType::Float:
      return decode::kFloat32;
    case ScalarType::Half:
      return decode::kFloat16;
    case ScalarType::BFloat16:
      return decode::kBFloat16;
    default:
      STD_TORCH_CHECK(false, name, " must be float32, float16 or bfloat16");
  }
}

Type cache_type(const Tensor& t, const char* name, Type like) {
  if (t.scalar_type() == ScalarType::Char) return decode::kInt8;
  if (t.scalar_type() == ScalarType::Float8_e4m3fn) return decode::kFloat8;
  STD_TORCH_CHECK(number_type(t, name) == like, name, " must have the query's dtype, or be int8 or float8_e4m3fn");
  return like;
}

// Eight numbers are loaded at once, 16 bytes at most to an instruction.
void check_octets(const Tensor& t, const char* name, int64_t bytes) {
  if (t.numel() == 0) return;
  const int64_t last = t.dim() - 1, unit = bytes == 1 ? 8 : 16;
  STD_TORCH_CHECK(t.size(last) % 8 == 0, name, " has rows of ", t.size(last), " numbers, expected a multiple of 8");
  STD_TORCH_CHECK(t.stride(last) == 1, name, ".stride(-1) must be 1, is ", t.stride(last));
  STD_TORCH_CHECK(reinterpret_cast<uintptr_t>(t.const_data_ptr()) % unit == 0, name, " must begin at a multiple of ",
                  unit, " bytes");
  for (int64_t i = 0; i < last; ++i)
    STD_TORCH_CHECK(t.size(i) <= 1 || t.stride(i) * bytes % unit == 0, name, ".stride(", i, ") is ", t.stride(i),
                    ", expected a multiple of ", unit / bytes);
}

const float* floats(const MaybeTensor& t, const char* name, const Tensor& like, std::initializer_list<int64_t> shape,
                    bool contiguous) {
  if (!t) return nullptr;
  check_device(*t, name, like);
  check_shape(*t, name, shape);
  STD_TORCH_CHECK(t->scalar_type() == ScalarType::Float && (!contiguous || t->is_contiguous()), name,
                  " must be float32", contiguous ? " and contiguous" : "");
  return static_cast<const float*>(address(*t));
}

const int64_t* integers(const Tensor& t, const char* name, const Tensor& like, int64_t size) {
  check_device(t, name, like);
  check_shape(t, name, {size});
  STD_TORCH_CHECK(t.scalar_type() == ScalarType::Long && t.is_contiguous(), name, " must be int64 and contiguous");
  return static_cast<const int64_t*>(address(t));
}

const uint8_t* flags(const MaybeTensor& t, const char* name, const Tensor& like, std::initializer_list<int64_t> shape) {
  if (!t) return nullptr;
  check_device(*t, name, like);
  check_shape(*t, name, shape);
  STD_TORCH_CHECK(t->scalar_type() == ScalarType::Bool, name, " must be bool");
  return static_cast<const uint8_t*>(address(*t));
}

template <int kAxes>
void set_strides(int64_t (&strides)[kAxes], const Tensor& t) {
  for (int i = 0; i < kAxes; ++i) strides[i] = t.stride(i);
}

float* scratch(const Tensor& t, const char* name, const Tensor& like, std::initializer_list<int64_t> shape) {
  check_device(t, name, like);
  check_shape(t, name, shape);
  STD_TORCH_CHECK(t.scalar_type() == ScalarType::Float, name, " must be float32");
  return static_cast<float*>(output(t, name));
}

// `tile`: slots of a block; `sums` and `statistics` have room for as many tiles as the slots make.
void attend(Tensor query, Tensor key, Tensor value, MaybeTensor mask, MaybeTensor logit_bias, MaybeTensor null_logit,
            MaybeTensor null_value, MaybeTensor key_scale, MaybeTensor value_scale, Tensor position, MaybeTensor valid,
            MaybeTensor chunk, double scale, int64_t chunk_size, int64_t tile, Tensor sums, Tensor statistics,
            Tensor out, Tensor lse) {
  Attend p{};
  STD_TORCH_CHECK(query.dim() == 4 && key.dim() == 5 && value.dim() == 5,
                  "query must have 4 dimensions, key and value 5");
  p.batch = small(query.size(0), "batch"), p.tokens = small(query.size(1), "tokens");
  p.heads = small(query.size(2), "heads"), p.dim = small(query.size(3), "dim");
  p.neighbours = small(key.size(1), "neighbours"), p.retrieved = small(key.size(2), "retrieved tokens");
  p.kv_heads = small(key.size(3), "key/value heads"), p.dim_value = small(value.size(4), "dim_value");
  const int64_t b = p.batch, t = p.tokens, h = p.heads, k = p.neighbours, r = p.retrieved;
  check_shape(key, "key", {b, k, r, p.kv_heads, p.dim});
  check_shape(value, "value", {b, k, r, p.kv_heads, p.dim_value});
  STD_TORCH_CHECK(p.dim >= 8 && p.dim <= decode::kMostColumns && p.dim_value >= 8 && p.dim_value <= decode::kMostColumns,
                  "head sizes must be in [8, ", decode::kMostColumns, "], got ", p.dim, " and ", p.dim_value);
  STD_TORCH_CHECK(p.kv_heads >= 1 && h % p.kv_heads == 0, "query has ", h, " heads and key ", p.kv_heads);
  STD_TORCH_CHECK(chunk_size >= 1, "chunk_size must be at least 1, got ", chunk_size);
  STD_TORCH_CHECK(tile >= 1 && tile <= decode::kMostSlots, "tile must be in [1, ", decode::kMostSlots, "], got ", tile);
  p.chunk_size = small(chunk_size, "chunk_size"), p.tile = static_cast<int>(tile), p.scale = static_cast<float>(scale);
  const int64_t slots = small(k * r, "slots");
  p.splits = static_cast<int>((slots + tile - 1) / tile);

  p.query_type = number_type(query, "query");
  p.key_type = cache_type(key, "key", p.query_type), p.value_type = cache_type(value, "value", p.query_type);
  check_device(query, "query", query), check_device(key, "key", query), check_device(value, "value", query);
  check_octets(query, "query", query.element_size());
  check_octets(key, "key", key.element_size()), check_octets(value, "value", value.element_size());
  p.query = address(query), p.key = address(key), p.value = address(value);
  set_strides(p.query_stride, query), set_strides(p.key_stride, key), set_strides(p.value_stride, value);

  p.mask = flags(mask, "mask", query, {b, k, r});
  if (mask) set_strides(p.mask_stride, *mask);
  p.valid = flags(valid, "valid", query, {b});
  STD_TORCH_CHECK(!valid || valid->is_contiguous(), "valid must be contiguous");
  if (logit_bias) {
    STD_TORCH_CHECK(logit_bias->dim() == 4, "logit_bias must have 4 dimensions, has ", logit_bias->dim());
    const int64_t wide = logit_bias->size(3);
    STD_TORCH_CHECK(wide == r || wide == slots, "logit_bias.shape[3] must be r or k * r, got ", wide);
    p.bias_per_slot = wide == slots;
    p.logit_bias = floats(logit_bias, "logit_bias", query, {b, t, h, wide}, true);
  }
  p.null_logit = floats(null_logit, "null_logit", query, {b, t, h}, true);
  STD_TORCH_CHECK(!null_value || null_logit, "null_value needs null_logit");
  if (null_value) {
    check_device(*null_value, "null_value", query);
    check_shape(*null_value, "null_value", {h, p.dim_value});
    STD_TORCH_CHECK(null_value->stride(1) == 1, "null_value.stride(-1) must be 1");
    p.null_value_type = number_type(*null_value, "null_value");
    p.null_value = address(*null_value), p.null_value_stride = null_value->stride(0);
  }
  p.key_scale = floats(key_scale, "key_scale", query, {b, k, r}, false);
  p.value_scale = floats(value_scale, "value_scale", query, {b, k, r}, false);
  STD_TORCH_CHECK(!key_scale == (p.key_type < decode::kInt8) && !value_scale == (p.value_type < decode::kInt8),
                  "a cache has a scale exactly when it is int8 or float8_e4m3fn");
  if (key_scale) set_strides(p.key_scale_stride, *key_scale);
  if (value_scale) set_strides(p.value_scale_stride, *value_scale);
  p.position = integers(position, "position", query, b);
  if (chunk) p.chunk = integers(*chunk, "chunk", query, b);

  p.sums = scratch(sums, "sums", query, {p.splits, b, t, h, p.dim_value});
  p.statistics = scratch(statistics, "statistics", query, {2, p.splits, b, t, h});
  p.lse = scratch(lse, "lse", query, {b, t, h});
  check_device(out, "out", query);
  check_shape(out, "out", {b, t, h, p.dim_value});
  p.out_type = number_type(out, "out");
  STD_TORCH_CHECK(p.out_type == p.query_type, "out must have the query's dtype");
  p.out = output(out, "out");
  if (out.numel() == 0) return;
  const OnDevice device(query);
  decode::attend(p, device.stream());
}

void project(Tensor x, Tensor weight, bool transposed, Tensor out) {
  Project p{};
  STD_TORCH_CHECK(x.dim() == 3 && weight.dim() == 3, "x and weight must have 3 dimensions");
  p.count = small(x.size(0), "rows of x"), p.heads = small(x.size(1), "heads");
  p.kv_heads = small(weight.size(0), "key/value heads");
  p.rows = small(weight.size(1), "weight.shape[1]"), p.columns = small(weight.size(2), "weight.shape[2]");
  p.transposed = transposed;
  check_shape(x, "x", {p.count, p.heads, transposed ? p.columns : p.rows});
  check_shape(out, "out", {p.count, p.heads, transposed ? p.rows : p.columns});
  STD_TORCH_CHECK(p.kv_heads >= 1 && p.heads % p.kv_heads == 0, "x has ", p.heads, " heads and weight ", p.kv_heads);
  STD_TORCH_CHECK(p.columns >= 8 && p.columns <= decode::kMostColumns && p.rows >= 1, "weight.shape[2] must be in [8, ",
                  decode::kMostColumns, "], got ", p.columns);
  STD_TORCH_CHECK(transposed || p.rows <= decode::kMostAdded, "weight.shape[1] must be at most ", decode::kMostAdded,
                  ", got ", p.rows);
  p.type = number_type(x, "x");
  STD_TORCH_CHECK(number_type(weight, "weight") == p.type && number_type(out, "out") == p.type,
                  "x, weight and out must have one dtype");
  check_device(x, "x", x), check_device(weight, "weight", x), check_device(out, "out", x);
  check_octets(weight, "weight", weight.element_size());
  check_octets(x, "x", x.element_size());
  p.x = address(x), p.weight = address(weight), p.out = output(out, "out");
  set_strides(p.x_stride, x), set_strides(p.weight_stride, weight);
  if (out.numel() == 0) return;
  const OnDevice device(x);
  decode::project(p, device.stream());
}

}  // namespace
}  // namespace retro_kernels

RK_DEFINE(m) {
  m.def(
      "decode_attend(Tensor query, Tensor key, Tensor value, Tensor? mask, Tensor? logit_bias, Tensor? null_logit, "
      "Tensor? null_value, Tensor? key_scale, Tensor? value_scale, Tensor position, Tensor? valid, Tensor? chunk, "
      "float scale, int chunk_size, int tile, Tensor(a!) sums, Tensor(b!) statistics, Tensor(c!) out, Tensor(d!) lse) "
      "-> ()");
  m.def("decode_project(Tensor x, Tensor weight, bool transposed, Tensor(a!) out) -> ()");
}

RK_IMPLEMENT(m) {
  m.impl("decode_attend", TORCH_BOX(&retro_kernels::attend));
  m.impl("decode_project", TORCH_BOX(&retro_kernels::project));
}
