#include "kernels/attention/backward.h"
#include "kernels/attention/engine.h"
#include "kernels/attention/forward.h"

namespace gptcore {
namespace GPTCORE_ISA_NS {
namespace {

#if defined(__AVX512BF16__)
using Bf16Engine = PairEngine;
#else
using Bf16Engine = F32Engine;
#endif

}  // namespace

extern const AttentionBodies attention_f32_bodies, attention_bf16_bodies;
const AttentionBodies attention_f32_bodies = {forward<F32Engine, float>, backward<F32Engine, float>};
const AttentionBodies attention_bf16_bodies = {forward<Bf16Engine, bf16>, backward<Bf16Engine, bf16>};

}  // namespace GPTCORE_ISA_NS
}  // namespace gptcore
