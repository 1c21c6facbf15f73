// Cross-entropy of given logits against classes, with torch.nn.functional.cross_entropy's meaning of the
// options.
//
//   lse[n] = log sum_v exp l[n,v]      w_v = class_weight[v], or 1
//   loss[n] = (1 - s) w_t (lse[n] - l[n,t]) + s/V sum_v w_v (lse[n] - l[n,v])   with t = targets[n],
//                                                                                s = label_smoothing
//   mean: sum over kept rows divided by sum of their w_t (NaN when that is zero over zero); sum; none: per
//   row dl[n,v] = g ((1-s) w_t (p[n,v] - [v = t]) + s/V (p[n,v] sum_u w_u - w_v)),   p = exp(l - lse)
//
// Shapes   logits, dlogits: (N, V), rows of any stride; targets: (N) int64, in [0, V) or ignore_index;
//          class_weight: (V); loss: () for mean and sum, (N) for none; lse: (N).
// Types    logits, dlogits f32 or bf16; loss f32 or logits' type; class_weight f32 or logits' type; lse f32.
// Ignored  rows with ignore_index: loss, lse and dlogits are 0, whatever the logits.
// None     class_weight; lse in forward when no backward follows; grad_loss (zero gradient).
// Aliasing dlogits may be logits.
// Bits     lse of a row and its gradient depend on that row and its factor only; sums over rows run in row
//          order in f64: the same bits on every thread count.
// Cost     forward NV * size bytes read, NV exponentials; backward 2NV * size bytes, NV exponentials.
// Errors   ValueError or TypeError on any violated line above, before anything is written.
#pragma once

#include <string>

#include "core/tensor_view.h"

namespace gptcore {

void cross_entropy_forward(const TensorView& logits, const TensorView& targets,
                           const TensorView& class_weight, int64_t ignore_index, double label_smoothing,
                           const std::string& reduction, const TensorView& loss, const TensorView& lse);

void cross_entropy_backward(const TensorView& grad_loss, const TensorView& logits, const TensorView& targets,
                            const TensorView& class_weight, const TensorView& lse, int64_t ignore_index,
                            double label_smoothing, const std::string& reduction, const TensorView& dlogits);

}  // namespace gptcore
