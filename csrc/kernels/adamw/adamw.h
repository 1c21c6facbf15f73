// Adam over many tensors (Kingma, Ba 2015) with decoupled weight decay (Loshchilov, Hutter 2019) or with L2 in
// the gradient, clipped by the global norm of the gradients, which the caller has from grad_norm.
//
//   s = 1 / grad_scale, negative with maximize
//   k = s * min(1, max_norm / (norm + 1e-6))          (k = s without max_norm)
//   g' = k g                                          (decoupled), else  g' = k g + weight_decay p
//   m = m + (1 - beta1) (g' - m)                      v = beta2 v + (1 - beta2) g'^2
//   w = max(w, v)                                     (w = v without max_exp_avg_sqs; Reddi et al. 2018)
//   p = p (1 - lr * weight_decay) - lr / (1 - beta1^step) * m / (sqrt(w) / sqrt(1 - beta2^step) + eps)
//   copy = bf16(p)                                    (not decoupled: the factor of p is 1)
//
// Split    With lows, params are bf16 weights, and weight and low together are p: its bits are
//          (weight << 16) + low, low signed; the weight is p rounded to nearest, ties away from zero. (With ties
//          to even 65537 numbers round to an even weight, one more than low can tell apart.) Every finite p and
//          both infinities survive; NaN becomes a NaN. Where a caller has set a weight to 0, a negative low
//          counts as 0: together they would be a NaN.
// Shapes   per tensor: params, lows, grads, exp_avgs, exp_avg_sqs, max_exp_avg_sqs, copies of one shape,
//          contiguous.
// Types    params, moments f32 (params bf16 with lows); grads f32 or bf16, each its own; lows i16; copies bf16.
//          steps: one element each, f32, overwritten with the update's number, for a caller that counts there; without
//          a step each is the count of updates before (on the processor all must agree).
// None     lows, max_exp_avg_sqs, copies, steps (empty lists; copies with lows); max_norm.
// Aliasing none between tensors.
// Bits     equal for any thread count.
// CUDA     step, lr, grad_scale and grad_norm may be tensors there, which kernels alone read: nothing waits for the
//          device. A norm that is not finite means that nothing is written and no count moves on.
// Cost     one read of g, one read and write of p, m, v (and w), one write of copy: 28 bytes a parameter in
//          f32, 36 with w, 26 with lows and bf16 gradients; 20 flops.
// Errors   ValueError or TypeError on any violated line above, before anything is written.
#pragma once

#include <optional>
#include <vector>

#include "core/step_number.h"

namespace gptcore {

// weight_decay has one entry per tensor.
struct AdamwLists {
  const std::vector<TensorView>&params, &lows, &grads, &exp_avgs, &exp_avg_sqs, &max_exp_avg_sqs, &copies,
      &steps;
  const std::vector<double>& weight_decay;
};

struct AdamwOptions {
  std::optional<StepNumber> step = 1;  // this update's number, from 1; none: one more than `steps` say
  StepNumber lr = 1e-3;
  double beta1 = 0.9, beta2 = 0.999, eps = 1e-8;
  bool decoupled = true, maximize = false;
  std::optional<double> max_norm;
  StepNumber grad_scale = 1.0;
};

// norm: of the gradients over grad_scale. Returns as grad_norm does.
std::pair<double, bool> adamw(const AdamwLists& lists, const AdamwOptions& options, const StepNumber& norm,
                              const StepResult& result = {});

}  // namespace gptcore
