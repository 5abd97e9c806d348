#define RK_LEVEL 4
#define RK_NAMESPACE level_amx_bf16
#include "kernels.h"

namespace retro_kernels {
extern const Level kLevel_amx_bf16;
const Level kLevel_amx_bf16 = {
    "amx_bf16", level_amx_bf16::scratch_bytes, level_amx_bf16::pack_relative, level_amx_bf16::forward, level_amx_bf16::backward,
    {level_amx_bf16::decode_plan, level_amx_bf16::decode_items, level_amx_bf16::decode_scratch, level_amx_bf16::decode_attend, level_amx_bf16::decode_combine, level_amx_bf16::project_scratch,
     level_amx_bf16::project},
    level_amx_bf16::absorbed_scratch_bytes, level_amx_bf16::absorbed_forward,
    level_amx_bf16::absorbed_backward_scratch_bytes, level_amx_bf16::absorbed_backward, level_amx_bf16::absorbed_states};
}  // namespace retro_kernels
