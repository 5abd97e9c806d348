// Tensors as the raw operations take them: checks of what would otherwise corrupt memory or fault on the device.
#pragma once
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>
#include <torch/headeronly/util/shim_utils.h>

#include <initializer_list>
#include <optional>

#include "common/problem.h"
#include "device.h"

namespace retro_kernels {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using MaybeTensor = std::optional<Tensor>;

// Where the raw operations are registered: torch.ops.retro_kernels_cuda, or, on CPU tensors, ..._emulator.
#if defined(RK_EMULATED)
#define RK_DEFINE(m) STABLE_TORCH_LIBRARY_FRAGMENT(retro_kernels_cuda_emulator, m)
#define RK_IMPLEMENT(m) STABLE_TORCH_LIBRARY_IMPL(retro_kernels_cuda_emulator, CPU, m)
#define RK_IMPLEMENT_ANYWHERE(m) STABLE_TORCH_LIBRARY_IMPL(retro_kernels_cuda_emulator, CompositeExplicitAutograd, m)
#else
#define RK_DEFINE(m) STABLE_TORCH_LIBRARY_FRAGMENT(retro_kernels_cuda, m)
#define RK_IMPLEMENT(m) STABLE_TORCH_LIBRARY_IMPL(retro_kernels_cuda, CUDA, m)
#define RK_IMPLEMENT_ANYWHERE(m) STABLE_TORCH_LIBRARY_IMPL(retro_kernels_cuda, CompositeExplicitAutograd, m)
#endif

// Makes the tensor's device current, and says which stream PyTorch is filling there.
class OnDevice {
 public:
#if defined(RK_EMULATED)
  explicit OnDevice(const Tensor&) { make_current(0); }
  Stream stream() const { return nullptr; }
#else
  explicit OnDevice(const Tensor& t) : index_(t.get_device_index()), guard_(index_) { make_current(index_); }
  Stream stream() const {
    void* stream = nullptr;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(index_, &stream));
    return stream;
  }

 private:
  int32_t index_;
  torch::stable::accelerator::DeviceGuard guard_;
#endif
};

inline void check_device(const Tensor& t, const char* name, const Tensor& like) {
#if defined(RK_EMULATED)
  STD_TORCH_CHECK(t.is_cpu(), name, " must be on the CPU in the emulator");
#else
  STD_TORCH_CHECK(t.is_cuda() && t.get_device_index() == like.get_device_index(), name,
                  " must be on the query's CUDA device");
#endif
}

inline void check_shape(const Tensor& t, const char* name, std::initializer_list<int64_t> shape) {
  STD_TORCH_CHECK(t.dim() == static_cast<int64_t>(shape.size()), name, " has ", t.dim(), " dimensions, expected ",
                  shape.size());
  int64_t i = 0;
  for (int64_t size : shape) {
    STD_TORCH_CHECK(t.size(i) == size, name, ".shape[", i, "] is ", t.size(i), ", expected ", size);
    ++i;
  }
}

inline ElementType half_type(const Tensor& t, const char* name) {
  const ScalarType type = t.scalar_type();
  STD_TORCH_CHECK(type == ScalarType::Half || type == ScalarType::BFloat16, name, " must be float16 or bfloat16");
  return type == ScalarType::Half ? kFloat16 : kBFloat16;
}

inline const void* address(const Tensor& t) { return t.numel() ? t.const_data_ptr() : nullptr; }

inline void* output(const Tensor& t, const char* name) {
  STD_TORCH_CHECK(t.is_contiguous(), name, " must be contiguous");
  return t.numel() ? t.mutable_data_ptr() : nullptr;
}

// Rows of 16-bit numbers are moved 16 bytes at a time.
inline void check_rows(const Tensor& t, const char* name) {
  if (t.numel() == 0) return;
  const int64_t last = t.dim() - 1;
  STD_TORCH_CHECK(t.size(last) <= 1 || t.stride(last) == 1, name, ".stride(-1) must be 1, is ", t.stride(last));
  STD_TORCH_CHECK(reinterpret_cast<uintptr_t>(t.const_data_ptr()) % 16 == 0, name, " must begin at a multiple of 16 bytes");
  for (int64_t i = 0; i < last; ++i)
    STD_TORCH_CHECK(t.size(i) <= 1 || t.stride(i) % 8 == 0, name, ".stride(", i, ") must be a multiple of 8, is ",
                    t.stride(i));
}

// Of [batch, chunk, neighbour, token(, head(, dim))].
inline Strides strides_of(const Tensor& t) {
  return {t.stride(0), t.stride(1), t.stride(2), t.stride(3), t.dim() > 4 ? t.stride(4) : 0};
}

}  // namespace retro_kernels
