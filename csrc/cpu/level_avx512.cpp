#define RK_LEVEL 2
#define RK_NAMESPACE level_avx512
#include "kernels.h"

namespace retro_kernels {
extern const Level kLevel_avx512;
const Level kLevel_avx512 = {
    "avx512", level_avx512::scratch_bytes, level_avx512::pack_relative, level_avx512::forward, level_avx512::backward,
    {level_avx512::decode_plan, level_avx512::decode_items, level_avx512::decode_scratch, level_avx512::decode_attend, level_avx512::decode_combine, level_avx512::project_scratch,
     level_avx512::project},
    level_avx512::absorbed_scratch_bytes, level_avx512::absorbed_forward,
    level_avx512::absorbed_backward_scratch_bytes, level_avx512::absorbed_backward, level_avx512::absorbed_states};
}  // namespace retro_kernels
