// Adam with decoupled weight decay (Loshchilov, Hutter 2019) over many tensors, clipped by their global norm.
//
//   s = 1 / grad_scale        norm = sqrt(sum over all tensors of (s g)^2)
//   k = s * min(1, max_norm / (norm + 1e-6))          (k = s without max_norm)
//   m = m + (1 - beta1) (k g - m)                     v = beta2 v + (1 - beta2) (k g)^2
//   p = p (1 - lr * weight_decay) - lr / (1 - beta1^step) * m / (sqrt(v) / sqrt(1 - beta2^step) + eps)
//   copy = bf16(p)
//
// Shapes   per tensor: params, grads, exp_avgs, exp_avg_sqs, copies of one shape, all contiguous.
// Types    params, moments f32; grads f32 or bf16, each its own; copies bf16.
// None     copies (an empty list); max_norm.
// Aliasing none between tensors.
// Result   (norm, found_inf). Where a gradient is inf or NaN, found_inf is true and nothing is written.
// Sums     squares in f32 over fixed chunks, chunks in f64 in order; a chunk whose squares leave the range of
//          f32 is summed in f64.
// Bits     equal for any thread count.
// Cost     two reads of g, one read and write of p, m, v, one write of copy: 32 bytes a parameter in f32 (36
//          if the caller needs the clipped gradient too, which torch writes and reads again); 20 flops.
// Errors   ValueError or TypeError on any violated line above, before anything is written.
#pragma once

#include <optional>
#include <utility>
#include <vector>

#include "core/tensor_view.h"

namespace gptcore {

struct AdamwOptions {
  int64_t step = 1;  // this update's number, from 1
  double lr = 1e-3, beta1 = 0.9, beta2 = 0.999, eps = 1e-8;
  std::optional<double> max_norm;
  double grad_scale = 1.0;
};

// weight_decay has one entry per tensor.
std::pair<double, bool> adamw(const std::vector<TensorView>& params, const std::vector<TensorView>& grads,
                              const std::vector<TensorView>& exp_avgs,
                              const std::vector<TensorView>& exp_avg_sqs,
                              const std::vector<TensorView>& copies, const std::vector<double>& weight_decay,
                              const AdamwOptions& options);

}  // namespace gptcore
