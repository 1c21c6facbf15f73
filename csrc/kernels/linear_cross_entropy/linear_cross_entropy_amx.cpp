#include "core/gemm_tile_amx.h"
#include "kernels/linear_cross_entropy/linear_cross_entropy_backward.h"

namespace gptcore {
namespace GPTCORE_ISA_NS {

extern const LinearCrossEntropyBodies linear_cross_entropy_bf16_bodies;
const LinearCrossEntropyBodies linear_cross_entropy_bf16_bodies = {forward<AmxPolicy>, backward<AmxPolicy>};

}  // namespace GPTCORE_ISA_NS
}  // namespace gptcore
