// The choice of K experts for every token of a mixture-of-experts layer: gates, places, losses, in one call.
//
//   p[n,e] = softmax_e l[n,e]         lse[n] = log sum_e exp l[n,e]
//   experts[n,k]: the K largest of l[n,:], the largest first; of equal ones the lower index first
//   gates[n,k] = p[n, experts[n,k]], divided by their sum over k with renormalise (which equals a softmax over
//                the K chosen logits)
//   second choice: kept where uniforms[n] < g2 / second_threshold, g2 = gates[n,1] / (gates[n,0] + gates[n,1])
//   places: all first choices, then all second ones, ...; in each the tokens by falling priority[n], of equal
//           ones (or without priorities) the earlier first. A choice that finds `capacity` others before it at
//           its expert is dropped. rows[n,k] = offsets[expert] + its place there, or -1; its gate is then 0.
//   balance = E sum_e share[e] P[e], P[e] = mean_n p[n,e], share[e] = how many tokens choose e / N': by first
//             choice, or by any with count_all;   z = mean_n lse[n]^2;   entropy = mean_n -sum_e p log p
//
// Shapes   logits, dlogits: (N, E), rows of any stride; mask (N): false for padding, which gets experts and
//          rows -1 and gates 0 and counts nowhere, so that N' tokens are left; priority, uniforms: (N);
//          experts, gates, rows: (N, K); offsets: (E + 1), of rows; requested: (E), choices before dropping;
//          balance_loss, z_loss, entropy and the losses' gradients: (); lse: (N); share: (E); dgates: (N, K).
// Types    logits, dlogits f32 or bf16; mask bool or uint8; experts, rows, offsets, requested int32; the rest
//          f32, as is all arithmetic.
// Limits   1 <= K <= 64, K <= E <= 4096, capacity >= 1; N K < 2^31.
// Backward reads padding from experts, where it is -1.
// None     mask, priority; uniforms unless second_threshold > 0, which needs K > 1; dgates, dbalance_loss and
//          dz_loss (zero gradient). With by_gate the priority is the first choice's p.
// NaN      counts as -inf in the choice; the token's gates, lse, the losses and the entropy become NaN.
// Empty    without a token that counts losses and entropy are 0.
// Layout   all but logits and dlogits contiguous.
// Aliasing none.
// Bits     Of a token: from that token alone, but for its rows. Sums over tokens in f32 over chunks that N
//          fixes, then f64 over chunks: the same bits on every thread count.
// Cost     forward N E read, 2 N E exponentials and 3 K N E comparisons at most; backward 2 N E * size bytes,
//          N E exponentials. Places N K steps on one thread; a sort of N with priorities.
// Errors   ValueError or TypeError on any violated line above, before anything is written. On CUDA backward does not look
//          for experts outside: they get no gradient of their gate.
#pragma once

#include "core/tensor_view.h"

namespace gptcore {

void moe_router_forward(const TensorView& logits, const TensorView& mask, const TensorView& priority,
                        const TensorView& uniforms, bool renormalise, bool by_gate, double second_threshold,
                        int64_t capacity, bool count_all, const TensorView& experts, const TensorView& gates,
                        const TensorView& rows, const TensorView& offsets, const TensorView& requested,
                        const TensorView& balance_loss, const TensorView& z_loss, const TensorView& entropy,
                        const TensorView& lse, const TensorView& share);

void moe_router_backward(const TensorView& dgates, const TensorView& dbalance_loss, const TensorView& dz_loss,
                         const TensorView& logits, const TensorView& experts, const TensorView& rows,
                         const TensorView& lse, const TensorView& share, bool renormalise,
                         const TensorView& dlogits);

}  // namespace gptcore
