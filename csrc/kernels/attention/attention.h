// Scaled dot-product attention, fused: scores and probabilities are never stored whole.
//
//   S[t,s] = softmax_scale * q[t] . k[s]       lse[t] = log sum_s exp S[t,s]       over the keys s that t
//   sees P[t,s] = exp(S[t,s] - lse[t])              out[t] = sum_s P[t,s] v[s] dv[s] = sum_t P[t,s] dout[t]
//   delta[t] = dout[t] . out[t] dS[t,s] = P[t,s] (dout[t] . v[s] - delta[t]) dq[t] = softmax_scale sum_s
//   dS[t,s] k[s]   dk[s] = softmax_scale sum_t dS[t,s] q[t]
//
// Query t sees key s where  t + S - T - left <= s <= t + S - T + right  (a negative bound: none); causal is
// right = 0, so the last query sees the last key. A query that sees nothing has out 0, lse -inf and gradient
// 0.
//
// Shapes   q, out, dout, dq (B, T, H, D); k, v, dk, dv (B, S, Hkv, D); Hkv divides H, query head h reads key
//          head h / (H / Hkv); 1 <= D <= 256; lse (B, H, T). Packed: (total, H, D), (total, Hkv, D), lse (H,
//          total), with cu_seqlens_q and cu_seqlens_k (documents + 1), int32, from 0 to the totals, not
//          decreasing.
// Types    q, k, v and their like of one type, f32 or bf16; lse f32.
// Strides  any, but the last dimension contiguous: views into a fused projection work, gradients included.
//          lse contiguous.
// Aliasing outputs overlap neither each other nor inputs; they may interleave within one buffer.
// Sums     f32. bf16: P and dS are rounded to bf16 before their products where the processor multiplies bf16.
// Bits     Equal for every thread count; each sequence depends on itself only. Forward: every row depends on
//          its own keys. dk and dv sum over query blocks in order, dq over key blocks in order.
// Memory   scratch per thread: packed K and V of a sequence and head forward, Q, dout and dq backward: O((T +
//          S) D).
// Cost     forward 4 D flops and one exponential per visible (t, s); backward 10 D and one. Blocks outside
//          the mask are skipped.
// Errors   ValueError or TypeError on any violated line above, before anything is written.
#pragma once

#include "core/tensor_view.h"

namespace gptcore {

// What both passes are told beside their tensors. A new option is a line here, in the tuple of
// bindings/attention.cpp, in AttentionProblem, and in `_OPTIONS` of ops/attention.py.
struct AttentionOptions {
  float softmax_scale;
  bool causal;
  int64_t left, right;  // window; -1: unbounded
};

// lse may be None. cu_seqlens_q and cu_seqlens_k are both given (packed) or both None.
void attention_forward(const TensorView& q, const TensorView& k, const TensorView& v,
                       const TensorView& cu_seqlens_q, const TensorView& cu_seqlens_k,
                       const AttentionOptions& options, const TensorView& out, const TensorView& lse);

// Gradients, overwritten.
void attention_backward(const TensorView& dout, const TensorView& q, const TensorView& k, const TensorView& v,
                        const TensorView& out, const TensorView& lse, const TensorView& cu_seqlens_q,
                        const TensorView& cu_seqlens_k, const AttentionOptions& options, const TensorView& dq,
                        const TensorView& dk, const TensorView& dv);

}  // namespace gptcore
