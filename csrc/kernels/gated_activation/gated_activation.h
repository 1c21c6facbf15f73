// Activations of the feed-forward layer, with bias, and their gated forms.
//
//   a[n,f] = gate[n,f] + gate_bias[f]      u[n,f] = up[n,f] + up_bias[f]
//   y[n,f] = act(a[n,f])                   plain
//   y[n,f] = act(a[n,f]) * u[n,f]          gated: SwiGLU, GEGLU, ReGLU (Shazeer 2020)
//
//   gelu_tanh  a / (1 + exp(-2 sqrt(2/pi) (a + 0.044715 a^3)))      gelu_erf  a/2 (1 + erf(a / sqrt 2))
//   silu       a / (1 + exp(-a))                                   relu      max(a, 0)
//
// Shapes   gate, up, y: (..., F), last dimension contiguous, leading dimensions mergeable; biases (F).
//          Packed: no up, gate is (..., 2F) with the gate in its first half, gate_bias is (2F) or None, and
//          so is the gradient: what one fused projection wrote.
// Types    gate, up, y of one type, f32 or bf16; biases of one type, f32 or bf16. Arithmetic in f32, one
//          rounding at the end.
// None     up (plain or packed), gate_bias, up_bias.
// Aliasing y may be gate or up, dgate may be gate or grad_y, element for element.
// Bits     forward is element by element; sums over rows run over fixed blocks and then over the blocks in
//          order: equal for any thread count.
// Cost     forward one read of each input, one write: 2NF elements plain, 3NF gated; backward 3NF and 5NF.
//          About 20 flops an element.
// Errors   ValueError or TypeError on any violated line above, before anything is written.
#pragma once

#include "core/tensor_view.h"

namespace gptcore {

enum Activation : int { kGeluTanh = 0, kGeluErf = 1, kSilu = 2, kRelu = 3 };
constexpr int kActivations = 4;
constexpr int kPacked = 4;  // added to an Activation: gated, gate and up in one tensor

// `kind` is an Activation, or that plus kPacked.
void gated_activation_forward(int kind, const TensorView& gate, const TensorView& up,
                              const TensorView& gate_bias, const TensorView& up_bias, const TensorView& y);

// Gradients, overwritten. dgate_bias and dup_bias are None where not wanted; else of the bias's type or f32.
void gated_activation_backward(int kind, const TensorView& grad_y, const TensorView& gate,
                               const TensorView& up, const TensorView& gate_bias, const TensorView& up_bias,
                               const TensorView& dgate, const TensorView& dup, const TensorView& dgate_bias,
                               const TensorView& dup_bias);

}  // namespace gptcore
