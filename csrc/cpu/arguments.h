// Tensors as the raw operations take them: scratch memory, and checks of what would otherwise corrupt memory.
#pragma once
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <cstdlib>
#include <initializer_list>
#include <optional>

#include "problem.h"

namespace retro_kernels {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using MaybeTensor = std::optional<Tensor>;

// A thread's scratch. It is kept between calls, since fresh pages would cost as much as a small call itself.
inline char* thread_scratch(size_t bytes) {
  struct Buffer {
    char* data = nullptr;
    size_t size = 0;
    ~Buffer() { std::free(data); }
  };
  static thread_local Buffer buffer;
  if (buffer.size < bytes) {
    std::free(buffer.data);
    buffer.data = nullptr;
    buffer.size = 0;
    void* fresh = nullptr;
    STD_TORCH_CHECK(posix_memalign(&fresh, 4096, bytes) == 0, "retro_kernels: no memory for ", bytes,
                    " bytes of scratch per thread");
    buffer.data = static_cast<char*>(fresh);
    buffer.size = bytes;
  }
  return buffer.data;
}

inline Type type_of(const Tensor& t, const char* name) {
  switch (t.scalar_type()) {
    case ScalarType::Float:
      return kFloat32;
    case ScalarType::Half:
      return kFloat16;
    case ScalarType::BFloat16:
      return kBFloat16;
    default:
      STD_TORCH_CHECK(false, name, " must be float32, float16 or bfloat16");
  }
}

inline void check_shape(const Tensor& t, const char* name, std::initializer_list<int64_t> shape) {
  STD_TORCH_CHECK(t.is_cpu(), name, " must be on the CPU");
  STD_TORCH_CHECK(t.dim() == static_cast<int64_t>(shape.size()), name, " has ", t.dim(), " dimensions, expected ",
                  shape.size());
  int64_t i = 0;
  for (int64_t size : shape) {
    STD_TORCH_CHECK(t.size(i) == size, name, ".shape[", i, "] is ", t.size(i), ", expected ", size);
    ++i;
  }
}

inline void check_last_stride(const Tensor& t, const char* name) {
  // a tensor without elements has any strides, and no copy gives it others
  STD_TORCH_CHECK(t.numel() == 0 || t.size(t.dim() - 1) == 1 || t.stride(t.dim() - 1) == 1, name,
                  ".stride(-1) must be 1");
}

inline const int32_t* integers(const Tensor& t, const char* name, std::initializer_list<int64_t> shape) {
  check_shape(t, name, shape);
  STD_TORCH_CHECK(t.scalar_type() == ScalarType::Int && t.is_contiguous(), name, " must be int32 and contiguous");
  static const int32_t nothing[2] = {};
  return t.numel() ? static_cast<const int32_t*>(t.const_data_ptr()) : nothing;
}

inline Operand operand(const MaybeTensor& t, const char* name, std::initializer_list<int64_t> shape) {
  Operand o;
  if (!t) return o;
  check_shape(*t, name, shape);
  check_last_stride(*t, name);
  o.type = type_of(*t, name);
  // a table without elements has no address, yet it was given
  static const float nothing = 0.0f;
  o.data = t->numel() ? t->const_data_ptr() : &nothing;
  o.stride0 = t->stride(0);
  o.stride1 = shape.size() > 2 ? t->stride(1) : 0;
  return o;
}

inline void* output(const Tensor& t, const char* name) {
  STD_TORCH_CHECK(t.is_cpu() && t.is_contiguous(), name, " must be contiguous and on the CPU");
  return t.numel() ? t.mutable_data_ptr() : nullptr;
}

}  // namespace retro_kernels
