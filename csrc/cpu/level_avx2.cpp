#define RK_LEVEL 1
#define RK_NAMESPACE level_avx2
#include "kernels.h"

namespace retro_kernels {
extern const Level kLevel_avx2;
const Level kLevel_avx2 = {
    "avx2", level_avx2::scratch_bytes, level_avx2::pack_relative, level_avx2::forward, level_avx2::backward,
    {level_avx2::decode_plan, level_avx2::decode_items, level_avx2::decode_scratch, level_avx2::decode_attend, level_avx2::decode_combine, level_avx2::project_scratch,
     level_avx2::project},
    level_avx2::absorbed_scratch_bytes, level_avx2::absorbed_forward,
    level_avx2::absorbed_backward_scratch_bytes, level_avx2::absorbed_backward, level_avx2::absorbed_states};
}  // namespace retro_kernels
