// Layer normalisation over the last dimension (Ba, Kiros, Hinton 2016), with an optional residual add in
// front.
//
//   h[n,c] = x[n,c] + residual[n,c]                      (h = x without residual)
//   mean[n] = 1/C sum_c h[n,c]      rstd[n] = 1 / sqrt(1/C sum_c (h[n,c] - mean[n])^2 + eps)
//   y[n,c] = (h[n,c] - mean[n]) * rstd[n] * (weight[c] + weight_offset) + bias[c]
//
// weight_offset 1 is a zero-centred weight, which decay draws to the identity; the sum is f32, where a bf16 one
// would lose small weights.
//
// Shapes   x, residual, h, y: (..., C), last dimension contiguous, leading dimensions mergeable; weight,
//          bias: (C); stats: (2, N), mean and rstd.
// Types    x, residual, h, y of one type, f32 or bf16; weight and bias of one type, f32 or bf16; stats f32.
// None     residual (then h is unused), weight (a factor of 1, without an offset), bias; stats when no backward
//          follows.
// Aliasing y and h may be x or residual, element for element.
// Sums     f32; h is rounded to its type first, so that forward and backward see the same values; the
//          variance is that of squared deviations from the mean, which does not cancel.
// Bits     each row depends on its own values only: equal for any N, thread count and position in a batch.
// Cost     forward 8NC flops and (2NC + 2C) * size bytes (4NC with residual); backward 13NC flops and 3NC *
//          size bytes (4NC with residual) plus bounded partial sums.
// Errors   ValueError or TypeError on any violated line above, before anything is written.
#pragma once

#include "core/tensor_view.h"

namespace gptcore {

void layer_norm_forward(const TensorView& x, const TensorView& residual, const TensorView& weight,
                        const TensorView& bias, float eps, float weight_offset, const TensorView& y,
                        const TensorView& h, const TensorView& stats);

// Gradients, overwritten. grad_h is what reaches h besides y (None: nothing): dx gets the whole gradient of
// h, which is that of x and of residual alike. h is the normalised input. dweight, dbias: (C) f32 or the type
// of weight; None where not wanted. Their sums run over fixed blocks of rows and then over the blocks in
// order.
void layer_norm_backward(const TensorView& grad_y, const TensorView& grad_h, const TensorView& h,
                         const TensorView& weight, float weight_offset, const TensorView& stats,
                         const TensorView& dx, const TensorView& dweight, const TensorView& dbias);

}  // namespace gptcore
