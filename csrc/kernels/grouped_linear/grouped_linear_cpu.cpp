#include "kernels/grouped_linear/grouped_column_sums.h"
#include "kernels/grouped_linear/grouped_packed.h"

namespace gptcore {
namespace GPTCORE_ISA_NS {

extern const GroupedBodies grouped_f32_bodies, grouped_bf16_bodies;
const GroupedBodies grouped_f32_bodies = {packed_cut<PlainPolicy>, packed_block<PlainPolicy>, column_sums,
                                          past_caches};
const GroupedBodies grouped_bf16_bodies = {packed_cut<Bf16Policy>, packed_block<Bf16Policy>, column_sums,
                                           past_caches};

}  // namespace GPTCORE_ISA_NS
}  // namespace gptcore
