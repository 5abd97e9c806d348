// The raw operations of the CPU backend, through torch's stable ABI: every output is an argument, so that Python
// allocates it. They check what would otherwise corrupt memory; what a user can get wrong is checked in api.py.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <string>

#include "arguments.h"
#include "dispatch.h"
#include "problem.h"

namespace retro_kernels {
namespace {

// The gradients of parameters, and their partial sums.
#define RK_PARAMETERS                                                                                             \
  MaybeTensor grad_bias, MaybeTensor grad_relative_key, MaybeTensor grad_content_bias,                             \
      MaybeTensor grad_relative_bias, MaybeTensor grad_null_key, MaybeTensor grad_null_value,                      \
      MaybeTensor bias_partial, MaybeTensor relative_partial, MaybeTensor content_bias_partial,                    \
      MaybeTensor relative_bias_partial, MaybeTensor null_key_partial, MaybeTensor null_value_partial
#define RK_ALL_PARAMETERS                                                                                         \
  grad_bias, grad_relative_key, grad_content_bias, grad_relative_bias, grad_null_key, grad_null_value,             \
      bias_partial, relative_partial, content_bias_partial, relative_bias_partial, null_key_partial, null_value_partial
#define RK_PARAMETERS_SCHEMA                                                                                      \
  "Tensor(d!)? grad_bias, Tensor(e!)? grad_relative_key, Tensor(f!)? grad_content_bias, "                          \
  "Tensor(g!)? grad_relative_bias, Tensor(h!)? grad_null_key, Tensor(i!)? grad_null_value, "                       \
  "Tensor(j!)? bias_partial, Tensor(k!)? relative_partial, Tensor(l!)? content_bias_partial, "                     \
  "Tensor(m!)? relative_bias_partial, Tensor(n!)? null_key_partial, Tensor(o!)? null_value_partial"

// The slots of ops/attention/common.py, in their order.
#define RK_ARGUMENTS                                                                                               \
  Tensor query, Tensor key, Tensor value, MaybeTensor mask, MaybeTensor bias, MaybeTensor relative_key,            \
      MaybeTensor content_bias, MaybeTensor relative_bias, MaybeTensor query_cos, MaybeTensor query_sin,           \
      MaybeTensor key_cos, MaybeTensor key_sin, MaybeTensor null_key, MaybeTensor null_value,                      \
      MaybeTensor chunk_spans, MaybeTensor first_visible, MaybeTensor dropout_seed
#define RK_SETTINGS                                                                                                  \
  int64_t grouping, bool causal, bool interleaved, double scale, double softcap, double dropout_p, int64_t stride, \
      int64_t first_token, MaybeTensor relative_packed
// Besides, `relative_packed`: room for the packed table, given with relative_key.
#define RK_ALL                                                                                                       \
  query, key, value, mask, bias, relative_key, content_bias, relative_bias, query_cos, query_sin, key_cos, key_sin,  \
      null_key, null_value, chunk_spans, first_visible, dropout_seed, grouping, causal, interleaved, scale, softcap, \
      dropout_p, stride, first_token, relative_packed

Problem make_problem(RK_ARGUMENTS, RK_SETTINGS) {
  Problem p{};
  STD_TORCH_CHECK(grouping >= kClock && grouping <= kChunk, "grouping must be 0, 1 or 2, got ", grouping);
  p.grouping = static_cast<Grouping>(grouping), p.causal = causal;
  STD_TORCH_CHECK(query.dim() == 6 && key.dim() == 6 && value.dim() == 6, "query, key and value must have 6 dimensions");
  p.batch = query.size(0), p.query_chunks = query.size(1), p.query_neighbours = query.size(2);
  p.tokens = query.size(3), p.heads = query.size(4), p.dim = query.size(5);
  p.chunks = key.size(1), p.neighbours = key.size(2), p.retrieved = key.size(3), p.kv_heads = key.size(4);
  p.dim_value = value.size(5);
  check_shape(key, "key", {p.batch, p.chunks, p.neighbours, p.retrieved, p.kv_heads, p.dim});
  check_shape(value, "value", {p.batch, p.chunks, p.neighbours, p.retrieved, p.kv_heads, p.dim_value});
  STD_TORCH_CHECK(query.is_cpu(), "query must be on the CPU");
  if (p.grouping == kClock) {
    STD_TORCH_CHECK(p.query_chunks == 1 && p.query_neighbours == 1, "grouping CLOCK needs query [b, 1, 1, n, h, d]");
    p.groups = p.chunks;
  } else if (p.grouping == kNeighbour) {
    STD_TORCH_CHECK(p.query_chunks == p.chunks && p.query_neighbours == p.neighbours && p.tokens == p.retrieved,
                    "grouping NEIGHBOUR needs query and key of the same [b, l, k, r]");
    p.groups = p.chunks * p.neighbours;
  } else {
    STD_TORCH_CHECK(p.query_chunks == p.chunks && p.neighbours == 1, "grouping CHUNK needs key [b, l, 1, r, hk, d]");
    p.groups = p.chunks;
  }
  STD_TORCH_CHECK(!causal || p.grouping == kNeighbour, "causal needs grouping NEIGHBOUR");
  STD_TORCH_CHECK(!first_visible || !bias, "first_visible excludes attention_bias");
  STD_TORCH_CHECK(!causal || p.tokens < (int64_t{1} << 31), "causal takes fewer than 2^31 tokens, got ", p.tokens);
  STD_TORCH_CHECK(p.dim >= 1 && p.dim <= 256 && p.dim_value >= 1 && p.dim_value <= 256,
                  "head sizes must be in [1, 256], got ", p.dim, " and ", p.dim_value);
  STD_TORCH_CHECK(p.kv_heads >= 1 && p.heads % p.kv_heads == 0, "query has ", p.heads, " heads and key ", p.kv_heads);
  STD_TORCH_CHECK(stride >= 1 || p.grouping != kClock, "stride must be at least 1, got ", stride);
  check_last_stride(query, "query");
  check_last_stride(key, "key");
  check_last_stride(value, "value");
  p.type = type_of(query, "query");
  STD_TORCH_CHECK(type_of(key, "key") == p.type && type_of(value, "value") == p.type,
                  "query, key and value must have one dtype");
  p.stride = p.grouping == kClock ? stride : p.tokens;
  p.first_token = p.grouping == kClock ? first_token : 0;
  p.scale = static_cast<float>(scale);
  STD_TORCH_CHECK(softcap >= 0 && std::isfinite(softcap), "softcap must be 0 or positive and finite, got ", softcap);
  p.softcap = static_cast<float>(softcap);
  p.query = query.numel() ? query.const_data_ptr() : nullptr;
  p.key = key.numel() ? key.const_data_ptr() : nullptr;
  p.value = value.numel() ? value.const_data_ptr() : nullptr;
  for (int i = 0; i < 5; ++i)
    p.query_stride[i] = query.stride(i), p.key_stride[i] = key.stride(i), p.value_stride[i] = value.stride(i);
  if (mask) {
    check_shape(*mask, "mask", {p.batch, p.chunks, p.neighbours, p.retrieved});
    STD_TORCH_CHECK(mask->scalar_type() == ScalarType::Bool, "mask must be bool");
    p.mask = mask->numel() ? static_cast<const uint8_t*>(mask->const_data_ptr()) : nullptr;
    for (int i = 0; i < 4; ++i) p.mask_stride[i] = mask->stride(i);
  }
  if (chunk_spans) {
    STD_TORCH_CHECK(p.grouping == kClock, "chunk_spans needs grouping CLOCK");
    p.chunk_spans = integers(*chunk_spans, "chunk_spans", {p.batch, p.chunks, 2});
    for (int64_t i = 0; i < p.batch * p.chunks; ++i) {
      const int64_t first = p.chunk_spans[2 * i], count = p.chunk_spans[2 * i + 1];
      STD_TORCH_CHECK(count >= 0 && count <= p.stride && (count == 0 || (first >= 0 && first + count <= p.tokens)),
                      "chunk_spans has ", count, " tokens from ", first, "; they must lie in [0, ", p.tokens,
                      ") and be at most ", p.stride);
    }
  }
  if (first_visible) {
    STD_TORCH_CHECK(causal && p.query_chunks == 1 && p.query_neighbours == 1,
                    "first_visible needs causal and query [b, 1, 1, n, h, d]");
    p.first_visible = integers(*first_visible, "first_visible", {p.batch, p.tokens});
    for (int64_t i = 0; i < p.batch * p.tokens; ++i)
      STD_TORCH_CHECK(p.first_visible[i] >= 0 && p.first_visible[i] <= i % p.tokens,
                      "first_visible must be between 0 and the token's own place, got ", p.first_visible[i]);
  }
  if (bias) {
    STD_TORCH_CHECK(bias->dim() == 3, "attention_bias must have 3 dimensions, has ", bias->dim());
    p.table_rows = bias->size(1), p.bias_slots = bias->size(2);
    STD_TORCH_CHECK(p.bias_slots == p.retrieved ||
                        (p.grouping == kClock && p.bias_slots == p.neighbours * p.retrieved),
                    "attention_bias.shape[2] must be r or k * r, got ", p.bias_slots);
    STD_TORCH_CHECK(p.table_rows >= p.stride, "attention_bias.shape[1] is ", p.table_rows, ", below the rows, ",
                    p.stride);
    p.bias = operand(bias, "attention_bias", {p.heads, p.table_rows, p.bias_slots});
  }
  const int tables = !!query_cos + !!query_sin + !!key_cos + !!key_sin;
  STD_TORCH_CHECK(tables == 0 || tables == 4, "rotary needs all four tables, got ", tables);
  if (tables == 4) {
    STD_TORCH_CHECK(query_cos->dim() == 2, "query_cos must have 2 dimensions, has ", query_cos->dim());
    const int64_t rows = query_cos->size(0);
    p.rotary_width = query_cos->size(1);
    STD_TORCH_CHECK(rows >= p.stride && 2 * p.rotary_width <= p.dim, "rotary tables [", rows, ", ", p.rotary_width,
                    "] do not fit ", p.stride, " rows and head size ", p.dim);
    p.query_cos = operand(query_cos, "query_cos", {rows, p.rotary_width});
    p.query_sin = operand(query_sin, "query_sin", {rows, p.rotary_width});
    p.key_cos = operand(key_cos, "key_cos", {p.retrieved, p.rotary_width});
    p.key_sin = operand(key_sin, "key_sin", {p.retrieved, p.rotary_width});
  }
  p.rotary_interleaved = interleaved;
  STD_TORCH_CHECK(!null_key == !null_value, "null_key and null_value must come together");
  p.null_key = operand(null_key, "null_key", {p.heads, p.dim});
  p.null_value = operand(null_value, "null_value", {p.heads, p.dim_value});
  STD_TORCH_CHECK(relative_key || (!content_bias && !relative_bias),
                  "content_bias and relative_bias need relative_key");
  STD_TORCH_CHECK(!relative_key == !relative_packed, "relative_key and its packed copy must come together");
  if (relative_key) {
    STD_TORCH_CHECK(tables == 0, "relative_key excludes rotary tables");
    STD_TORCH_CHECK(relative_key->dim() == 3, "relative_key must have 3 dimensions, has ", relative_key->dim());
    p.distances = relative_key->size(1);
    STD_TORCH_CHECK(p.distances >= p.stride + p.retrieved - 1, "relative_key.shape[1] is ", p.distances,
                    ", too small for ", p.stride, " rows and ", p.retrieved, " tokens");
    p.relative_key = operand(relative_key, "relative_key", {p.heads, p.distances, p.dim});
    p.content_bias = operand(content_bias, "content_bias", {p.heads, p.dim});
    p.relative_bias = operand(relative_bias, "relative_bias", {p.heads, p.dim});
    STD_TORCH_CHECK(relative_packed->dim() == 3 && type_of(*relative_packed, "relative_packed") == kFloat32,
                    "relative_packed must be float32 with 3 dimensions");
    p.relative_rows = relative_packed->size(1), p.relative_width = relative_packed->size(2);
    const int64_t padded = (p.dim + 15) / 16 * 16, more = p.type == kBFloat16 || padded % 128 == 0 ? 16 : 0;
    STD_TORCH_CHECK(relative_packed->size(0) == p.heads && p.relative_rows >= (p.distances + 7) / 8 * 8 + 8 &&
                        p.relative_rows % 8 == 0 && p.relative_width >= padded + more,
                    "relative_packed is too small");
    p.relative_packed = static_cast<float*>(output(*relative_packed, "relative_packed"));
  }
  STD_TORCH_CHECK(dropout_p >= 0 && dropout_p < 1, "dropout_p must be in [0, 1), got ", dropout_p);
  STD_TORCH_CHECK(dropout_p == 0 || dropout_seed, "dropout_p > 0 needs dropout_seed");
  if (dropout_p > 0) {
    STD_TORCH_CHECK(dropout_seed->is_cpu() && dropout_seed->scalar_type() == ScalarType::Long &&
                        dropout_seed->numel() == 1,
                    "dropout_seed must be one int64 on the CPU");
    p.dropout = true;
    p.seed = static_cast<uint64_t>(*static_cast<const int64_t*>(dropout_seed->const_data_ptr()));
    p.threshold = static_cast<uint32_t>(std::min(std::nearbyint(dropout_p * 65536), 65535.0));
    p.survivor = static_cast<float>(1.0 / (1.0 - p.threshold / 65536.0));
  }
  return p;
}

int64_t bytes_of(Type type) { return type == kFloat32 ? 4 : 2; }

// The log-sum-exp, of two planes where there is a bias.
void set_lse(Problem& p, const Tensor& lse, bool written) {
  if (p.bias.data)
    check_shape(lse, "lse", {2, p.batch, p.query_chunks, p.query_neighbours, p.tokens, p.heads});
  else
    check_shape(lse, "lse", {p.batch, p.query_chunks, p.query_neighbours, p.tokens, p.heads});
  STD_TORCH_CHECK(type_of(lse, "lse") == kFloat32 && lse.is_contiguous(), "lse must be float32 and contiguous");
  if (lse.numel() == 0) return;
  p.lse = static_cast<float*>(written ? lse.mutable_data_ptr() : const_cast<void*>(lse.const_data_ptr()));
  if (p.bias.data) p.log_sum = p.lse + lse.numel() / 2;
}

// out and lse of a forward.
void set_outputs(Problem& p, const Tensor& out, const Tensor& lse) {
  check_shape(out, "out", {p.batch, p.query_chunks, p.query_neighbours, p.tokens, p.heads, p.dim_value});
  STD_TORCH_CHECK(type_of(out, "out") == p.type, "out must have the query's dtype");
  p.out = output(out, "out");
  set_lse(p, lse, true);
}

// Zeroes `rows` (and sets lse, if any, to -inf) of the tokens that attend to no chunk.
void clear_idle_tokens(const Problem& p, void* rows, int64_t row_bytes, float* lse, float* log_sum) {
  if (p.grouping != kClock) return;
  int64_t start = std::min(std::max<int64_t>(p.first_token, 0), p.tokens);
  int64_t end = std::max(start, std::min(p.first_token + p.chunks * p.stride, p.tokens));
  if (p.chunk_spans) start = end = 0;
  const auto clear = [&](int64_t b, int64_t first, int64_t last) {
    if (first >= last) return;
    const int64_t at = (b * p.tokens + first) * p.heads, count = (last - first) * p.heads;
    std::memset(static_cast<char*>(rows) + at * row_bytes, 0, count * row_bytes);
    if (lse) std::fill(lse + at, lse + at + count, -INFINITY);
    if (log_sum) std::fill(log_sum + at, log_sum + at + count, 0.0f);
  };
  for (int64_t b = 0; b < p.batch; ++b) {
    clear(b, 0, start);
    clear(b, end, p.tokens);
  }
}

void pack_relative(const Problem& p, const Level& chosen) {
  if (!p.relative_key.data) return;
  torch::stable::parallel_for(0, p.heads, 1, [&](int64_t first, int64_t last) {
    for (int64_t head = first; head < last; ++head) chosen.pack_relative(p, head);
  });
}

void forward(RK_ARGUMENTS, RK_SETTINGS, Tensor out, Tensor lse) {
  Problem p = make_problem(RK_ALL);
  set_outputs(p, out, lse);
  if (lse.numel() == 0) return;
  clear_idle_tokens(p, p.out, p.dim_value * bytes_of(p.type), p.lse, p.log_sum);
  const Level& chosen = level();
  pack_relative(p, chosen);
  const size_t bytes = chosen.scratch_bytes(p, false);
  torch::stable::parallel_for(0, p.batch * p.groups * p.kv_heads, 1, [&](int64_t first, int64_t last) {
    chosen.forward(p, first, last, thread_scratch(bytes));
  });
}

// `key` and `value` of the problem have the shapes that keys and values would have and are not read.
Absorbed make_absorbed(const Problem& problem, const Tensor& encoded, const Tensor& w_key, const Tensor& w_value,
                       const MaybeTensor& bias_key, const MaybeTensor& bias_value) {
  Absorbed a{};
  a.p = problem;
  Problem& p = a.p;
  STD_TORCH_CHECK(p.grouping == kClock && p.rotary_width == 0 && p.softcap == 0.0f,
                  "the absorbed kernels need grouping CLOCK, no rotation and no softcap");
  p.key = p.value = nullptr;
  STD_TORCH_CHECK(encoded.dim() == 5, "encoded must have 5 dimensions, has ", encoded.dim());
  a.width = encoded.size(4);
  STD_TORCH_CHECK(a.width >= 1 && a.width <= 8192, "encoded.shape[4] must be in [1, 8192], got ", a.width);
  check_shape(encoded, "encoded", {p.batch, p.chunks, p.neighbours, p.retrieved, a.width});
  check_shape(w_key, "w_key", {p.kv_heads, p.dim, a.width});
  check_shape(w_value, "w_value", {p.kv_heads, p.dim_value, a.width});
  check_last_stride(encoded, "encoded");
  check_last_stride(w_key, "w_key");
  check_last_stride(w_value, "w_value");
  STD_TORCH_CHECK(type_of(encoded, "encoded") == p.type && type_of(w_key, "w_key") == p.type &&
                      type_of(w_value, "w_value") == p.type,
                  "encoded, w_key and w_value must have the query's dtype");
  a.encoded = encoded.numel() ? encoded.const_data_ptr() : nullptr;
  a.w_key = w_key.const_data_ptr(), a.w_value = w_value.const_data_ptr();
  for (int i = 0; i < 4; ++i) a.encoded_stride[i] = encoded.stride(i);
  for (int i = 0; i < 2; ++i) a.w_key_stride[i] = w_key.stride(i), a.w_value_stride[i] = w_value.stride(i);
  a.bias_key = operand(bias_key, "bias_key", {p.kv_heads, p.dim});
  a.bias_value = operand(bias_value, "bias_value", {p.kv_heads, p.dim_value});
  return a;
}

void absorbed_forward(RK_ARGUMENTS, RK_SETTINGS, Tensor encoded, Tensor w_key, Tensor w_value, MaybeTensor bias_key,
                      MaybeTensor bias_value, Tensor out, Tensor lse) {
  Absorbed a = make_absorbed(make_problem(RK_ALL), encoded, w_key, w_value, bias_key, bias_value);
  Problem& p = a.p;
  set_outputs(p, out, lse);
  if (lse.numel() == 0) return;
  clear_idle_tokens(p, p.out, p.dim_value * bytes_of(p.type), p.lse, p.log_sum);
  const Level& chosen = level();
  pack_relative(p, chosen);
  const size_t bytes = chosen.absorbed_scratch_bytes(a);
  torch::stable::parallel_for(0, p.batch * p.groups * p.kv_heads, 1, [&](int64_t first, int64_t last) {
    chosen.absorbed_forward(a, first, last, thread_scratch(bytes));
  });
}

// Writes numbers into a contiguous tensor of its own dtype, which need not be that of any other.
struct Writer {
  Type type;
  void* out;

  Writer(const Tensor& t, const char* name) : type(type_of(t, name)), out(output(t, name)) {}

  void put(int64_t at, float x) const {
    if (type == kFloat32)
      static_cast<float*>(out)[at] = x;
    else if (type == kFloat16)
      static_cast<torch::headeronly::Half*>(out)[at] = torch::headeronly::Half(x);
    else
      static_cast<torch::headeronly::BFloat16*>(out)[at] = torch::headeronly::BFloat16(x);
  }
};

// Sums the partial copies in their order and rounds to the gradient's dtype.
void reduce_copies(const float* partial, int64_t copies, const MaybeTensor& given, const char* name) {
  if (!partial) return;
  const Tensor& total = *given;
  const int64_t n = total.numel();
  const Writer out(total, name);
  torch::stable::parallel_for(0, n, 8192, [&](int64_t first, int64_t last) {
    for (int64_t i = first; i < last; ++i) {
      float sum = 0.0f;
      for (int64_t c = 0; c < copies; ++c) sum += partial[c * n + i];
      out.put(i, sum);
    }
  });
}

// The same for relative_key, whose partial sums have padded rows and are still to be scaled.
void reduce_relative(const Problem& p, const MaybeTensor& given) {
  if (!p.relative_partial) return;
  const int64_t width = (p.dim + 15) / 16 * 16, each = p.heads * p.distances * width;
  const Writer out(*given, "grad_relative_key");
  torch::stable::parallel_for(0, p.heads * p.distances, 64, [&](int64_t first, int64_t last) {
    for (int64_t row = first; row < last; ++row) {
      const float* from = p.relative_partial + row * width;
      float sum[256] = {};
      for (int64_t c = 0; c < p.copies; ++c)
        for (int64_t i = 0; i < p.dim; ++i) sum[i] += from[c * each + i];
      for (int64_t i = 0; i < p.dim; ++i) out.put(row * p.dim + i, sum[i] * p.scale);
    }
  });
}

// The partial sums of one parameter gradient, [copies, *shape] fp32, or null when it is not wanted.
float* partial_sums(const MaybeTensor& partial, const MaybeTensor& total, int64_t* copies, const char* name) {
  STD_TORCH_CHECK(!partial == !total, name, " and its partial sums must come together");
  if (!partial) return nullptr;
  STD_TORCH_CHECK(partial->dim() == total->dim() + 1 && type_of(*partial, name) == kFloat32 && partial->size(0) >= 1 &&
                      partial->numel() == partial->size(0) * total->numel() &&
                      (*copies == 0 || *copies == partial->size(0)),
                  "the partial sums of ", name, " must be float32 [copies, *shape], one number of copies for all");
  *copies = partial->size(0);
  return static_cast<float*>(output(*partial, name));
}

// What both backwards are given but the gradients of keys and values, or of what they are made of.
void set_gradients(Problem& p, const Tensor& grad_out, const MaybeTensor& grad_lse, const Tensor& out, const Tensor& lse, const Tensor& grad_query,
                   const MaybeTensor& bias, const MaybeTensor& relative_key, const MaybeTensor& content_bias,
                   const MaybeTensor& relative_bias, const MaybeTensor& null_key, RK_PARAMETERS) {
  const auto rows = {p.batch, p.query_chunks, p.query_neighbours, p.tokens, p.heads, p.dim_value};
  check_shape(grad_out, "grad_out", rows);
  check_shape(out, "out", rows);
  check_last_stride(grad_out, "grad_out");
  STD_TORCH_CHECK(type_of(grad_out, "grad_out") == p.type && type_of(out, "out") == p.type,
                  "grad_out and out must have the query's dtype");
  check_shape(grad_query, "grad_query",
              {p.batch, p.query_chunks, p.query_neighbours, p.tokens, p.heads, p.dim});
  STD_TORCH_CHECK(type_of(grad_query, "grad_query") == p.type, "grad_query must have the query's dtype");
  if (grad_bias) {
    STD_TORCH_CHECK(!!bias, "grad_bias without attention_bias");
    check_shape(*grad_bias, "grad_bias", {p.heads, p.table_rows, p.bias_slots});
  }
  STD_TORCH_CHECK(!grad_null_key == !grad_null_value, "grad_null_key and grad_null_value must come together");
  if (grad_null_key) {
    STD_TORCH_CHECK(!!null_key, "grad_null_key without null_key");
    check_shape(*grad_null_key, "grad_null_key", {p.heads, p.dim});
    check_shape(*grad_null_value, "grad_null_value", {p.heads, p.dim_value});
  }
  p.out = const_cast<void*>(out.numel() ? out.const_data_ptr() : nullptr);
  STD_TORCH_CHECK(out.is_contiguous(), "out must be contiguous");
  set_lse(p, lse, false);
  if (grad_lse) {
    check_shape(*grad_lse, "grad_lse", {p.batch, p.query_chunks, p.query_neighbours, p.tokens, p.heads});
    STD_TORCH_CHECK(type_of(*grad_lse, "grad_lse") == kFloat32 && grad_lse->is_contiguous(),
                    "grad_lse must be contiguous float32");
    p.grad_lse = grad_lse->numel() ? static_cast<const float*>(grad_lse->const_data_ptr()) : nullptr;
  }
  p.grad_out = grad_out.numel() ? grad_out.const_data_ptr() : nullptr;
  for (int i = 0; i < 5; ++i) p.grad_out_stride[i] = grad_out.stride(i);
  p.grad_query = output(grad_query, "grad_query");
  p.bias_partial = partial_sums(bias_partial, grad_bias, &p.copies, "grad_bias");
  STD_TORCH_CHECK(!grad_relative_key == !relative_partial, "grad_relative_key and its partial sums must come together");
  if (relative_partial) {
    STD_TORCH_CHECK(!!relative_key, "grad_relative_key without relative_key");
    check_shape(*grad_relative_key, "grad_relative_key", {p.heads, p.distances, p.dim});
    const int64_t copies = relative_partial->size(0);
    check_shape(*relative_partial, "relative_partial", {copies, p.heads, p.distances, (p.dim + 15) / 16 * 16});
    STD_TORCH_CHECK(copies >= 1 && (p.copies == 0 || p.copies == copies) &&
                        type_of(*relative_partial, "relative_partial") == kFloat32,
                    "the partial sums of relative_key must be float32, one number of copies for all");
    p.copies = copies;
    p.relative_partial = static_cast<float*>(output(*relative_partial, "relative_partial"));
  }
  for (const auto& [grad, given, name] : {std::tuple(&grad_content_bias, &content_bias, "grad_content_bias"),
                                          std::tuple(&grad_relative_bias, &relative_bias, "grad_relative_bias")})
    if (*grad) {
      STD_TORCH_CHECK(!!*given, name, " without its parameter");
      check_shape(**grad, name, {p.heads, p.dim});
    }
  p.content_bias_partial = partial_sums(content_bias_partial, grad_content_bias, &p.copies, "grad_content_bias");
  p.relative_bias_partial = partial_sums(relative_bias_partial, grad_relative_bias, &p.copies, "grad_relative_bias");
  p.null_key_partial = partial_sums(null_key_partial, grad_null_key, &p.copies, "grad_null_key");
  p.null_value_partial = partial_sums(null_value_partial, grad_null_value, &p.copies, "grad_null_value");

  if (p.grad_query) clear_idle_tokens(p, p.grad_query, p.dim * bytes_of(p.type), nullptr, nullptr);
}

// Zeroes a copy's partial sums of the heads [first, last).
void clear_partials(const Problem& p, int64_t copy, int64_t first, int64_t last) {
  const auto clear = [&](float* partial, int64_t per_head) {
    if (partial)
      std::fill(partial + (copy * p.heads + first) * per_head, partial + (copy * p.heads + last) * per_head, 0.0f);
  };
  clear(p.bias_partial, p.table_rows * p.bias_slots);
  clear(p.relative_partial, p.distances * ((p.dim + 15) / 16 * 16));
  clear(p.content_bias_partial, p.dim);
  clear(p.relative_bias_partial, p.dim);
  clear(p.null_key_partial, p.dim);
  clear(p.null_value_partial, p.dim_value);
}

void reduce_parameters(const Problem& p, RK_PARAMETERS) {
  reduce_copies(p.bias_partial, p.copies, grad_bias, "grad_bias");
  reduce_relative(p, grad_relative_key);
  reduce_copies(p.content_bias_partial, p.copies, grad_content_bias, "grad_content_bias");
  reduce_copies(p.relative_bias_partial, p.copies, grad_relative_bias, "grad_relative_bias");
  reduce_copies(p.null_key_partial, p.copies, grad_null_key, "grad_null_key");
  reduce_copies(p.null_value_partial, p.copies, grad_null_value, "grad_null_value");
}

void backward(Tensor grad_out, MaybeTensor grad_lse, RK_ARGUMENTS, Tensor out, Tensor lse, RK_SETTINGS, Tensor grad_query, Tensor grad_key,
              Tensor grad_value, RK_PARAMETERS) {
  Problem p = make_problem(RK_ALL);
  set_gradients(p, grad_out, grad_lse, out, lse, grad_query, bias, relative_key, content_bias, relative_bias, null_key,
                RK_ALL_PARAMETERS);
  check_shape(grad_key, "grad_key", {p.batch, p.chunks, p.neighbours, p.retrieved, p.kv_heads, p.dim});
  check_shape(grad_value, "grad_value", {p.batch, p.chunks, p.neighbours, p.retrieved, p.kv_heads, p.dim_value});
  STD_TORCH_CHECK(type_of(grad_key, "grad_key") == p.type && type_of(grad_value, "grad_value") == p.type,
                  "gradients must have the dtype of query, key and value");
  p.grad_key = output(grad_key, "grad_key");
  p.grad_value = output(grad_value, "grad_value");
  p.stream_gradients = (grad_key.numel() + grad_value.numel()) * bytes_of(p.type) > (8 << 20);
  const Level& chosen = level();
  pack_relative(p, chosen);
  const size_t bytes = chosen.scratch_bytes(p, true);
  const int64_t places = p.batch * p.groups;
  if (p.copies == 0) {
    torch::stable::parallel_for(0, places * p.kv_heads, 1, [&](int64_t first, int64_t last) {
      char* scratch = thread_scratch(bytes);
      for (int64_t item = first; item < last; ++item) chosen.backward(p, item, item + 1 < last ? item + 1 : -1, 0, scratch);
    });
    return;
  }
  // Copy c sums over the c-th of `copies` contiguous ranges of (batch, group), in order. Heads write apart within a
  // copy, so a task is (copy, range of kv heads): neither rule knows the number of threads.
  const int64_t head_ranges = std::min<int64_t>(p.kv_heads, 8), group = p.heads / p.kv_heads;
  torch::stable::parallel_for(0, p.copies * head_ranges, 1, [&](int64_t first, int64_t last) {
    char* scratch = thread_scratch(bytes);
    for (int64_t task = first; task < last; ++task) {
      const int64_t copy = task / head_ranges, range = task % head_ranges;
      const int64_t head = range * p.kv_heads / head_ranges, end = (range + 1) * p.kv_heads / head_ranges;
      clear_partials(p, copy, head * group, end * group);
      for (int64_t place = copy * places / p.copies; place < (copy + 1) * places / p.copies; ++place)
        for (int64_t kv = head; kv < end; ++kv) {
          const int64_t item = place * p.kv_heads + kv;
          const int64_t next_place = place + 1 < (copy + 1) * places / p.copies ? (place + 1) * p.kv_heads + head : -1;
          chosen.backward(p, item, kv + 1 < end ? item + 1 : next_place, copy, scratch);
        }
    }
  });
  reduce_parameters(p, RK_ALL_PARAMETERS);
}

// The gradient of a projection's weight [kv, rows, e], and of its bias [kv, rows] where wanted, from their transposed
// sum.
void write_weight(const Absorbed& a, const float* total, int64_t rows, float factor, const MaybeTensor& weight,
                  const MaybeTensor& bias, const char* name, const char* bias_name) {
  if (!total) return;
  const int64_t ld = (rows + 15) / 16 * 16, padded = (absorbed_columns(a) + 15) / 16 * 16;
  const Writer out(*weight, name);
  std::optional<Writer> out_bias;
  if (bias) out_bias.emplace(*bias, bias_name);
  torch::stable::parallel_for(0, a.p.kv_heads * rows, 4, [&](int64_t first, int64_t last) {
    for (int64_t row = first; row < last; ++row) {
      const float* from = total + row / rows * padded * ld + row % rows;
      for (int64_t w = 0; w < a.width; ++w) out.put(row * a.width + w, from[w * ld] * factor);
      if (out_bias) out_bias->put(row, from[a.width * ld] * factor);
    }
  });
}

void absorbed_backward(Tensor grad_out, MaybeTensor grad_lse, RK_ARGUMENTS, Tensor out, Tensor lse, RK_SETTINGS, Tensor encoded,
                       Tensor w_key, Tensor w_value, MaybeTensor bias_key, MaybeTensor bias_value, Tensor grad_query,
                       MaybeTensor grad_encoded, MaybeTensor grad_w_key, MaybeTensor grad_w_value,
                       MaybeTensor grad_bias_value, RK_PARAMETERS, MaybeTensor states_total,
                       MaybeTensor w_key_total, MaybeTensor w_value_total, MaybeTensor query_total, int64_t blocks) {
  Absorbed a = make_absorbed(make_problem(RK_ALL), encoded, w_key, w_value, bias_key, bias_value);
  Problem& p = a.p;
  set_gradients(p, grad_out, grad_lse, out, lse, grad_query, bias, relative_key, content_bias, relative_bias, null_key,
                RK_ALL_PARAMETERS);
  STD_TORCH_CHECK(p.copies <= 1, "the absorbed backward takes one copy of the partial sums, got ", p.copies);
  const int64_t padded = (absorbed_columns(a) + 15) / 16 * 16;
  const int64_t slots = p.neighbours * p.retrieved, key_block = absorbed_key_block(a.width);
  a.ranges = std::min<int64_t>(p.kv_heads, 8);
  a.blocks = blocks;
  STD_TORCH_CHECK(blocks >= 1 && blocks <= 4, "blocks must be 1 to 4, got ", blocks);
  STD_TORCH_CHECK(!grad_encoded == !states_total, "grad_encoded and its partial sums must come together");
  if (grad_encoded) {
    check_shape(*grad_encoded, "grad_encoded", {p.batch, p.chunks, p.neighbours, p.retrieved, a.width});
    STD_TORCH_CHECK(type_of(*grad_encoded, "grad_encoded") == p.type, "grad_encoded must have the query's dtype");
    a.ld_states = blocks * key_block + 16;
    if (slots <= key_block) a.ld_states = (slots + 15) / 16 * 16 + 16;
    check_shape(*states_total, "states_total", {a.ranges, padded, a.ld_states});
    STD_TORCH_CHECK(type_of(*states_total, "states_total") == kFloat32, "states_total must be float32");
    a.grad_states = static_cast<float*>(output(*states_total, "states_total"));
    a.grad_encoded = output(*grad_encoded, "grad_encoded");
    if (a.grad_encoded) std::memset(a.grad_encoded, 0, grad_encoded->numel() * bytes_of(p.type));
  }
  STD_TORCH_CHECK(!grad_w_key == !w_key_total && !grad_w_value == !w_value_total && !grad_w_key == !grad_w_value,
                  "the weights' gradients and their sums must come together");
  if (grad_w_key) {
    check_shape(*grad_w_key, "grad_w_key", {p.kv_heads, p.dim, a.width});
    check_shape(*grad_w_value, "grad_w_value", {p.kv_heads, p.dim_value, a.width});
    STD_TORCH_CHECK(!grad_bias_value || bias_value, "grad_bias_value without bias_value");
    if (grad_bias_value) check_shape(*grad_bias_value, "grad_bias_value", {p.kv_heads, p.dim_value});
    check_shape(*w_key_total, "w_key_total", {p.kv_heads, padded, (p.dim + 15) / 16 * 16});
    check_shape(*w_value_total, "w_value_total", {p.kv_heads, padded, (p.dim_value + 15) / 16 * 16});
    STD_TORCH_CHECK(type_of(*w_key_total, "w_key_total") == kFloat32 && type_of(*w_value_total, "w_value_total") == kFloat32,
                    "the sums of the weights' gradients must be float32");
    a.w_key_total = static_cast<float*>(output(*w_key_total, "w_key_total"));
    a.w_value_total = static_cast<float*>(output(*w_value_total, "w_value_total"));
  }
  // With relative positions a key block holds whole neighbours, or part of one.
  const bool part = p.relative_key.data && p.retrieved > key_block;
  const int64_t per_block = p.relative_key.data && !part ? key_block / std::max<int64_t>(p.retrieved, 1) * p.retrieved : key_block;
  const auto following = [&](int64_t begin) {
    const int64_t end = std::min(slots, begin + blocks * per_block);
    return part ? std::min(end, (begin / p.retrieved + 1) * p.retrieved) : end;
  };
  if (following(0) < slots) {
    STD_TORCH_CHECK(!!query_total, "query_total is needed for ", slots, " slots");
    check_shape(*query_total, "query_total", {p.heads, p.stride, (p.dim + 15) / 16 * 16});
    STD_TORCH_CHECK(type_of(*query_total, "query_total") == kFloat32, "query_total must be float32");
    a.query_total = static_cast<float*>(output(*query_total, "query_total"));
  }
  const Level& chosen = level();
  pack_relative(p, chosen);
  const size_t bytes = chosen.absorbed_backward_scratch_bytes(a);
  const int64_t group = p.heads / p.kv_heads;
  const auto heads_of = [&](int64_t range) { return range * p.kv_heads / a.ranges; };
  // A head's sums are written by its range alone: neither they nor the order of anything knows the number of threads.
  torch::stable::parallel_for(0, a.ranges, 1, [&](int64_t first, int64_t last) {
    for (int64_t range = first; range < last; ++range) {
      const int64_t head = heads_of(range), end = heads_of(range + 1);
      if (p.copies) clear_partials(p, 0, head * group, end * group);
      for (const auto& [total, dim] : {std::tuple(a.w_key_total, p.dim), std::tuple(a.w_value_total, p.dim_value)})
        if (total) std::fill(total + head * padded * ((dim + 15) / 16 * 16), total + end * padded * ((dim + 15) / 16 * 16), 0.0f);
    }
  });
  for (int64_t place = 0; place < p.batch * p.groups; ++place)
    for (int64_t begin = 0; begin == 0 || begin < slots;) {
      const int64_t end = following(begin);
      torch::stable::parallel_for(0, a.ranges, 1, [&](int64_t first, int64_t last) {
        for (int64_t range = first; range < last; ++range)
          chosen.absorbed_backward(a, place, begin, end, range, heads_of(range), heads_of(range + 1), thread_scratch(bytes));
      });
      if (a.grad_states)
        torch::stable::parallel_for(0, a.ld_states / 16, 1, [&](int64_t first, int64_t last) {
          for (int64_t c = first; c < last; ++c) chosen.absorbed_states(a, place, begin, end, c * 16);
        });
      begin = end;
      if (slots == 0) break;
    }
  write_weight(a, a.w_key_total, p.dim, p.scale, grad_w_key, std::nullopt, "grad_w_key", "");
  write_weight(a, a.w_value_total, p.dim_value, 1.0f, grad_w_value, grad_bias_value, "grad_w_value",
               "grad_bias_value");
  if (p.copies) reduce_parameters(p, RK_ALL_PARAMETERS);
}

std::string isa() { return level().name; }
std::string isas() { return usable_levels(); }
void set_isa(std::string name) { choose_level(name); }

}  // namespace
}  // namespace retro_kernels

#define RK_SLOTS_SCHEMA                                                                                              \
  "Tensor query, Tensor key, Tensor value, Tensor? mask, Tensor? attention_bias, Tensor? relative_key, "              \
  "Tensor? content_bias, Tensor? relative_bias, Tensor? query_cos, Tensor? query_sin, Tensor? key_cos, "              \
  "Tensor? key_sin, Tensor? null_key, Tensor? null_value, Tensor? chunk_spans, Tensor? first_visible, "               \
  "Tensor? dropout_seed, "
#define RK_SETTINGS_SCHEMA                                                                                           \
  "int grouping, bool causal, bool rotary_interleaved, float scale, float softcap, float dropout_p, int stride, "      \
  "int first_token, "                                                                                                  \
  "Tensor(z!)? relative_packed, "

STABLE_TORCH_LIBRARY_FRAGMENT(retro_kernels_cpu, m) {
  m.def("attention_forward(" RK_SLOTS_SCHEMA RK_SETTINGS_SCHEMA "Tensor(a!) out, Tensor(b!) lse) -> ()");
  m.def("absorbed_forward(" RK_SLOTS_SCHEMA RK_SETTINGS_SCHEMA
        "Tensor encoded, Tensor w_key, Tensor w_value, Tensor? bias_key, Tensor? bias_value, Tensor(a!) out, "
        "Tensor(b!) lse) -> ()");
  m.def("attention_backward(Tensor grad_out, Tensor? grad_lse, " RK_SLOTS_SCHEMA "Tensor out, Tensor lse, " RK_SETTINGS_SCHEMA
        "Tensor(a!) grad_query, Tensor(b!) grad_key, Tensor(c!) grad_value, " RK_PARAMETERS_SCHEMA ") -> ()");
  m.def("absorbed_backward(Tensor grad_out, Tensor? grad_lse, " RK_SLOTS_SCHEMA "Tensor out, Tensor lse, " RK_SETTINGS_SCHEMA
        "Tensor encoded, Tensor w_key, Tensor w_value, Tensor? bias_key, Tensor? bias_value, Tensor(a!) grad_query, "
        "Tensor(b!)? grad_encoded, Tensor(c!)? grad_w_key, Tensor(p!)? grad_w_value, "
        "Tensor(r!)? grad_bias_value, " RK_PARAMETERS_SCHEMA ", Tensor(s!)? states_total, Tensor(t!)? w_key_total, "
        "Tensor(u!)? w_value_total, Tensor(v!)? query_total, int blocks) -> ()");
  m.def("isa() -> str");
  m.def("isas() -> str");
  m.def("set_isa(str name) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(retro_kernels_cpu, CPU, m) {
  m.impl("attention_forward", TORCH_BOX(&retro_kernels::forward));
  m.impl("absorbed_forward", TORCH_BOX(&retro_kernels::absorbed_forward));
  m.impl("absorbed_backward", TORCH_BOX(&retro_kernels::absorbed_backward));
  m.impl("attention_backward", TORCH_BOX(&retro_kernels::backward));
}

STABLE_TORCH_LIBRARY_IMPL(retro_kernels_cpu, CompositeExplicitAutograd, m) {
  m.impl("isa", TORCH_BOX(&retro_kernels::isa));
  m.impl("isas", TORCH_BOX(&retro_kernels::isas));
  m.impl("set_isa", TORCH_BOX(&retro_kernels::set_isa));
}
