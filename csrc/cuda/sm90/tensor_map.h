// Maps for the copy engine. The driver's functions are found through the runtime, so that nothing links libcuda.
#pragma once
#include <algorithm>
#include <stdexcept>
#include <string>

#include "../common/launch.cuh"
#include "problem.h"

#if defined(RK_EMULATED)
#include "../emulator/driver.h"
#endif

namespace retro_kernels {
namespace sm90 {

// One axis: how many, and how far apart in elements.
struct Axis {
  int64_t size, stride;
};

using Encode = CUresult (*)(CUtensorMap*, CUtensorMapDataType, cuuint32_t, void*, const cuuint64_t*, const cuuint64_t*,
                            const cuuint32_t*, const cuuint32_t*, CUtensorMapInterleave, CUtensorMapSwizzle,
                            CUtensorMapL2promotion, CUtensorMapFloatOOBfill);

#if defined(RK_EMULATED)

inline Encode encoder() { return emulator::encode_tiled; }
inline std::string name_of(CUresult) { return ""; }

#else

// A function of the driver as it was in a version of CUDA, or null.
inline void* driver_function(const char* name, int version) {
  void* found = nullptr;
  cudaDriverEntryPointQueryResult status;
  check(cudaGetDriverEntryPointByVersion(name, &found, version, cudaEnableDefault, &status),
        "cudaGetDriverEntryPointByVersion");
  return status == cudaDriverEntryPointSuccess ? found : nullptr;
}

inline Encode encoder() {
  static const auto found = reinterpret_cast<Encode>(driver_function("cuTensorMapEncodeTiled", 12000));
  if (!found)
    throw std::runtime_error("retro_kernels: the driver has no cuTensorMapEncodeTiled; update it to one for CUDA 12 or newer");
  return found;
}

inline std::string name_of(CUresult error) {
  const auto get = reinterpret_cast<CUresult (*)(CUresult, const char**)>(driver_function("cuGetErrorName", 6000));
  const char* name = nullptr;
  return get && get(error, &name) == CUDA_SUCCESS && name ? name : "";
}

#endif

// False where the copy engine cannot walk the tensor: an axis that is expanded, or a stride or size beyond its limits.
// What else the driver has to say is an error.
inline bool make_map(TensorMap& map, const void* data, Axis axes[5], int box_tokens) {
  for (int i = 1; i < 5; ++i) {
    if (axes[i].size < 1 || axes[i].size > INT32_MAX) return false;
    // the stride of an axis of one may be anything, so it gets the one that it would have in a contiguous tensor
    if (axes[i].size == 1) axes[i].stride = std::max<int64_t>(axes[i - 1].size * axes[i - 1].stride, 8);
    if (axes[i].stride <= 0 || axes[i].stride % 8 || axes[i].stride >= int64_t{1} << 39) return false;
  }
  cuuint64_t sizes[5], strides[4];
  cuuint32_t box[5] = {64, 1, static_cast<cuuint32_t>(box_tokens), 1, 1}, steps[5] = {1, 1, 1, 1, 1};
  for (int i = 0; i < 5; ++i) sizes[i] = axes[i].size;
  for (int i = 0; i < 4; ++i) strides[i] = 2 * axes[i + 1].stride;
  // the type only says how what lies beyond the tensor's ends is filled: with zeros, the same for both of 16 bits
  const CUresult result =
      encoder()(&map, CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, 5, const_cast<void*>(data), sizes, strides, box, steps,
                CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
                CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  if (result != CUDA_SUCCESS && result != CUDA_ERROR_INVALID_VALUE)
    throw std::runtime_error("retro_kernels: cuTensorMapEncodeTiled failed: error " + std::to_string(result) + " " +
                             name_of(result));
  return result == CUDA_SUCCESS;
}

// Sequences and chunks as one axis; chunks alone where sequences are none.
inline bool folds(const Strides& s, int batch, int chunks) {
  return batch <= 1 || (chunks == 1 ? s.batch > 0 : s.batch == s.chunk * chunks);
}

inline Axis folded(const Strides& s, int batch, int chunks) {
  return {static_cast<int64_t>(batch) * chunks, chunks == 1 ? s.batch : s.chunk};
}

inline bool map_queries(TensorMap& map, const Problem& p, const void* data, const Strides& s, int box_rows) {
  const bool clock = p.grouping == kClock;
  if (!clock && !folds(s, p.batch, p.chunks)) return false;
  Axis axes[5] = {{p.dim, 1}, {p.heads, s.head}, {p.tokens, s.token}, {clock ? 1 : p.query_neighbours, s.neighbour},
                  clock ? Axis{p.batch, s.batch} : folded(s, p.batch, p.chunks)};
  return make_map(map, data, axes, box_rows);
}

inline bool map_keys(TensorMap& map, const Problem& p, const void* data, const Strides& s, int box_slots) {
  if (!folds(s, p.batch, p.chunks)) return false;
  Axis axes[5] = {{p.dim, 1}, {p.kv_heads, s.head}, {p.retrieved, s.token}, {p.neighbours, s.neighbour},
                  folded(s, p.batch, p.chunks)};
  return make_map(map, data, axes, box_slots);
}

// What the copy engine's attention kernels do not take of a problem whose rows (of a chunk or neighbour) come in tiles
// of `tile`, or null.
inline const char* not_taken(const Problem& p, int64_t rows, int tile) {
  if (p.chunk_spans) return "packed documents (chunk_spans)";
  if (p.grouping == kClock && rows > tile && rows % tile) return "a stride above 64 that is no multiple of 64";
  if (p.neighbours * static_cast<int64_t>(p.retrieved) == 0 || p.chunks == 0) return "keys of no size";
  if (rows == 0) return "queries of no size";
  if (p.first_token < INT32_MIN / 2 || p.first_token > INT32_MAX / 2) return "tokens more than 2^30 away";
  return nullptr;
}
constexpr const char* kTooMany = "more than 2^30 tiles of rows";
constexpr const char* kUnwalkable =
    "tensors that the copy engine cannot walk: sequences and chunks must lie at one distance, no axis expanded";

}  // namespace sm90
}  // namespace retro_kernels
