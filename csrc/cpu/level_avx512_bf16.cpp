#define RK_LEVEL 3
#define RK_NAMESPACE level_avx512_bf16
#include "kernels.h"

namespace retro_kernels {
extern const Level kLevel_avx512_bf16;
const Level kLevel_avx512_bf16 = {
    "avx512_bf16", level_avx512_bf16::scratch_bytes, level_avx512_bf16::pack_relative, level_avx512_bf16::forward, level_avx512_bf16::backward,
    {level_avx512_bf16::decode_plan, level_avx512_bf16::decode_items, level_avx512_bf16::decode_scratch, level_avx512_bf16::decode_attend, level_avx512_bf16::decode_combine, level_avx512_bf16::project_scratch,
     level_avx512_bf16::project},
    level_avx512_bf16::absorbed_scratch_bytes, level_avx512_bf16::absorbed_forward,
    level_avx512_bf16::absorbed_backward_scratch_bytes, level_avx512_bf16::absorbed_backward, level_avx512_bf16::absorbed_states};
}  // namespace retro_kernels
