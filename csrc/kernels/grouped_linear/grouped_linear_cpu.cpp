#include "kernels/grouped_linear/grouped_column_sums.h"
#include "kernels/grouped_linear/grouped_few.h"

namespace gptcore {
namespace GPTCORE_ISA_NS {

extern const GroupedBodies grouped_f32_bodies, grouped_bf16_bodies;
const GroupedBodies grouped_f32_bodies = {f32_cut, f32_block, column_sums, past_caches};
const GroupedBodies grouped_bf16_bodies = {packed_cut<Bf16Policy>, packed_block<Bf16Policy>, column_sums,
                                           past_caches};

}  // namespace GPTCORE_ISA_NS
}  // namespace gptcore
