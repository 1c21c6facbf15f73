// Root mean square normalisation over the last dimension (Zhang, Sennrich 2019), with an optional residual
// add in front.
//
//   h[n,c] = x[n,c] + residual[n,c]                  (h = x without residual)
//   rstd[n] = 1 / sqrt(1/C sum_c h[n,c]^2 + eps)
//   y[n,c] = h[n,c] * rstd[n] * (weight[c] + weight_offset)
//
// weight_offset 1 is a zero-centred weight (Gemma), which decay draws to the identity; the sum is f32, where a bf16
// one would lose small weights.
//
// Shapes   x, residual, h, y: (..., C), last dimension contiguous, leading dimensions mergeable; weight: (C);
//          rstd: (N).
// Types    x, residual, h, y of one type, f32 or bf16; weight f32 or bf16; rstd f32.
// None     residual (then h is unused), weight (a factor of 1, without an offset); rstd when no backward follows.
// Aliasing y and h may be x or residual, element for element.
// Sums     f32; h is rounded to its type first, so that forward and backward see the same values.
// Bits     each row depends on its own values only: equal for any N, thread count and position in a batch.
// Cost     forward 5NC flops and (2NC + C) * size bytes (4NC with residual); backward 11NC flops and 3NC *
//          size bytes (4NC with residual) plus bounded partial sums.
// Errors   ValueError or TypeError on any violated line above, before anything is written.
#pragma once

#include "core/tensor_view.h"

namespace gptcore {

void rms_norm_forward(const TensorView& x, const TensorView& residual, const TensorView& weight, float eps,
                      float weight_offset, const TensorView& y, const TensorView& h, const TensorView& rstd);

// Gradients, overwritten. grad_h is what reaches h besides y (None: nothing): dx gets the whole gradient of
// h, which is that of x and of residual alike. h is the normalised input. dweight: (C), f32 or the type of
// weight; None where not wanted; its sums run over fixed blocks of rows and then over the blocks in order.
void rms_norm_backward(const TensorView& grad_y, const TensorView& grad_h, const TensorView& h,
                       const TensorView& weight, float weight_offset, const TensorView& rstd,
                       const TensorView& dx, const TensorView& dweight);

}  // namespace gptcore
