#include "kernels/grouped_linear/grouped_blocked_amx.h"
#include "kernels/grouped_linear/grouped_column_sums.h"

namespace gptcore {
namespace GPTCORE_ISA_NS {

extern const GroupedBodies grouped_bf16_bodies;
const GroupedBodies grouped_bf16_bodies = {blocked_cut, blocked_block, column_sums, past_caches};

}  // namespace GPTCORE_ISA_NS
}  // namespace gptcore
