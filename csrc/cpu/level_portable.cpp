#define RK_LEVEL 0
#define RK_NAMESPACE level_portable
#include "kernels.h"

namespace retro_kernels {
extern const Level kLevel_portable;
const Level kLevel_portable = {
    "portable", level_portable::scratch_bytes, level_portable::pack_relative, level_portable::forward, level_portable::backward,
    {level_portable::decode_plan, level_portable::decode_items, level_portable::decode_scratch, level_portable::decode_attend, level_portable::decode_combine, level_portable::project_scratch,
     level_portable::project},
    level_portable::absorbed_scratch_bytes, level_portable::absorbed_forward,
    level_portable::absorbed_backward_scratch_bytes, level_portable::absorbed_backward, level_portable::absorbed_states};
}  // namespace retro_kernels
