#include "kernels/moe_router/moe_router.h"

#include "cases.h"

namespace gptcore::cases {
namespace {

// Several chunks of tokens; a capacity that drops some, places by gate.
Outputs routed(DType dtype, int64_t count) {
  const int64_t tokens = 1500, choices = 2;
  const Tensor logits = uniform(dtype, {tokens, count}, 1),
               dgates = uniform(DType::f32, {tokens, choices}, 2), dbalance = uniform(DType::f32, {}, 3),
               dz = uniform(DType::f32, {}, 4);
  const Tensor experts(DType::i32, {tokens, choices}), gates(DType::f32, {tokens, choices}),
      rows(DType::i32, {tokens, choices}), offsets(DType::i32, {count + 1}), requested(DType::i32, {count}),
      balance(DType::f32, {}), z(DType::f32, {}), entropy(DType::f32, {}), lse(DType::f32, {tokens}),
      share(DType::f32, {count}), dlogits(dtype, {tokens, count});
  moe_router_forward(logits, {}, {}, {}, true, true, 0.0, tokens / count, false, experts, gates, rows,
                     offsets, requested, balance, z, entropy, lse, share);
  moe_router_backward(dgates, dbalance, dz, logits, experts, rows, lse, share, true, dlogits);
  return {experts, gates, rows, offsets, requested, balance, z, entropy, lse, share, dlogits};
}

const ForBothTypes few("moe_router few experts", [](DType dtype) { return routed(dtype, 8); });
const ForBothTypes many("moe_router many experts", [](DType dtype) { return routed(dtype, 70); });

}  // namespace
}  // namespace gptcore::cases
