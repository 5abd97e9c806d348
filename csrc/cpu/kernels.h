// Fused attention within groups, forward and backward, for one instruction-set level (see simd.h). What a group, a row
// and a slot are is said in retro_kernels/ops/attention/common.py.
//
// A work item is one (batch, group, kv head). Its visible keys are packed, `key_block` at a time and masked tokens left
// out altogether, into per-thread buffers; its rows are those of all query heads that read the kv head, taken kRows at a
// time. Scores are kept transposed, [key][row]: keys and values then serve as the broadcast operand just as they lie in
// memory, only the (fewer) rows are transposed, and softmax runs down the lanes without any horizontal operation. Rows
// are padded to kRowStep with zeros; a padded row has finite scores and contributes zero.
//
//   forward    S' = K Q'    softmax down S'    O = P V
//   backward   S' = K Q'    G' = V dO'         dV = P' dO    dK = dS' Q    dQ = dS K      (dS = P (G - delta))
//
// With bf16 dot products (kPairs) an "element" of a multiplied matrix is a pair of bf16 adjacent along the summed
// index. Otherwise bf16 and fp16 are widened to fp32 when packed. Sums and softmax are fp32 throughout.
//
// Any number of keys and rows runs in the same scratch.
#pragma once
#include "absorbed_backward.h"
#include "backward.h"
#include "decode.h"
#include "forward.h"

namespace retro_kernels {
namespace RK_NAMESPACE {
namespace {

static void pack_relative(const Problem& p, int64_t head) {
  if (p.type == kBFloat16 && RK_LEVEL >= 3)
    pack_table<bfloat_t, (RK_LEVEL >= 3)>(p, Sizes(p, true), head);
  else
    pack_table<float, false>(p, Sizes(p, false), head);
}

static size_t scratch_bytes(const Problem& p, bool backward) {
  const Sizes z(p, p.type == kBFloat16 && RK_LEVEL >= 3);
  Arena arena{nullptr};
  if (backward)
    BackwardBuffers(p, z, &arena);
  else
    ForwardBuffers(p, z, &arena);
  return arena.used;
}

}  // namespace
}  // namespace RK_NAMESPACE
}  // namespace retro_kernels
