// The driver's part in a tensor map, for the emulator: what of cuda.h sm90/tensor_map.h uses, and an encoder that holds
// its caller to the contract that cuda.h states.
//
// RETRO_KERNELS_EMULATOR_DRIVER_ERROR is what it then answers in place of 0.
#pragma once
#include <cstdlib>
#include <string>

#include "emulator.h"
#include "tensor_map.h"

#if !defined(CUDA_VERSION)  // not beside cuda.h, where a test compares the two

enum CUresult : int { CUDA_SUCCESS = 0, CUDA_ERROR_INVALID_VALUE = 1, CUDA_ERROR_INVALID_CONTEXT = 201 };
enum CUtensorMapDataType : int { CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 = 9 };
enum CUtensorMapInterleave : int { CU_TENSOR_MAP_INTERLEAVE_NONE = 0 };
enum CUtensorMapSwizzle : int { CU_TENSOR_MAP_SWIZZLE_128B = 3 };
enum CUtensorMapL2promotion : int { CU_TENSOR_MAP_L2_PROMOTION_L2_256B = 3 };
enum CUtensorMapFloatOOBfill : int { CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE = 0 };
using cuuint32_t = uint32_t;
using cuuint64_t = uint64_t;
using CUtensorMap = retro_kernels::emulator::TensorMap;

#endif

namespace retro_kernels {
namespace emulator {

// Whether this thread has made a context current.
inline bool& has_context() {
  static thread_local bool has = false;
  return has;
}

inline void demand(bool kept, const char* clause) {
  if (!kept) throw Fault(std::string("cuTensorMapEncodeTiled: ") + clause);
}

inline CUresult encode_tiled(CUtensorMap* map, CUtensorMapDataType type, cuuint32_t rank, void* data,
                             const cuuint64_t* sizes, const cuuint64_t* strides, const cuuint32_t* box,
                             const cuuint32_t* steps, CUtensorMapInterleave interleave, CUtensorMapSwizzle swizzle,
                             CUtensorMapL2promotion promotion, CUtensorMapFloatOOBfill fill) {
  if (!has_context()) return CUDA_ERROR_INVALID_CONTEXT;
  if (const char* given = std::getenv("RETRO_KERNELS_EMULATOR_DRIVER_ERROR"))
    if (const int error = std::atoi(given)) return static_cast<CUresult>(error);
  demand(reinterpret_cast<uintptr_t>(map) % 64 == 0, "the map must be aligned to 64 bytes");
  demand(type == CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, "elements of two bytes are what the emulator has");
  demand(rank == 5, "the emulator has maps of five axes");
  demand(reinterpret_cast<uintptr_t>(data) % 16 == 0, "the tensor must begin at a multiple of 16 bytes");
  demand(interleave == CU_TENSOR_MAP_INTERLEAVE_NONE && swizzle == CU_TENSOR_MAP_SWIZZLE_128B &&
             promotion == CU_TENSOR_MAP_L2_PROMOTION_L2_256B && fill == CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE,
         "the emulator has no interleaving, swizzles of 128 bytes, and zeros out of bounds");
  demand(box[0] * 2 % 16 == 0 && box[0] * 2 <= 128, "a box's rows must be multiples of 16 bytes, up to the swizzle's 128");
  for (cuuint32_t i = 0; i < rank; ++i) {
    demand(sizes[i] >= 1 && sizes[i] <= uint64_t{1} << 32, "an axis must have 1 to 2^32 elements");
    demand(box[i] >= 1 && box[i] <= 256, "a box must have 1 to 256 elements of an axis");
    demand(steps[i] >= 1 && steps[i] <= 8, "steps must be 1 to 8");
    if (i > 0) demand(strides[i - 1] % 16 == 0 && strides[i - 1] < uint64_t{1} << 40,
                      "a stride must be a multiple of 16 bytes below 2^40");
    map->size[i] = sizes[i], map->stride[i] = i == 0 ? 2 : strides[i - 1], map->box[i] = box[i];
  }
  map->data = static_cast<char*>(data);
  return CUDA_SUCCESS;
}

}  // namespace emulator
}  // namespace retro_kernels
