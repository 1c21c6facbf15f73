#include "kernels/linear_cross_entropy/linear_cross_entropy_backward.h"

namespace gptcore {
namespace GPTCORE_ISA_NS {

extern const LinearCrossEntropyBodies linear_cross_entropy_f32_bodies, linear_cross_entropy_bf16_bodies;
const LinearCrossEntropyBodies linear_cross_entropy_f32_bodies = {forward<PlainPolicy>,
                                                                  backward<PlainPolicy>};
const LinearCrossEntropyBodies linear_cross_entropy_bf16_bodies = {forward<Bf16Policy>, backward<Bf16Policy>};

}  // namespace GPTCORE_ISA_NS
}  // namespace gptcore
