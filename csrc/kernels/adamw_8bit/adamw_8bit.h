// AdamW with moments of 8 bits, quantised block by block (Dettmers et al. 2022), over many tensors per call.
//
//   k = min(1, max_norm / (norm + 1e-6)) / grad_scale        norm: of all g / grad_scale together
//   m = map_m[exp_avg] * exp_avg_scale                       v = map_v[exp_avg_sq] * exp_avg_sq_scale
//   m = m + (1 - beta1) (k g - m)                            v = beta2 v + (1 - beta2) (k g)^2
//   p = p (1 - lr * weight_decay) - lr / (1 - beta1^step) * m / (sqrt(v) / sqrt(1 - beta2^step) + eps)
//   scale = max |x| over 256 neighbours, code = the nearest of map[.] to x / scale          (x = m, then v)
//   copy = bf16(p)      or, where p is bf16, p rounded up or down with odds by its distance
//
// The dynamic map: for decades i = 0 .. 6 the n_i = 2^i (m) or 2^(i+1) (v) values
// 10^(i-6) (0.1 + 0.9 (k + 1/2) / n_i), for m of both signs, beside 0 and 1. Codes number them in order: m has
// its zero at 127 and no -1, v at 0.
//
// Shapes   per tensor: params, grads, exp_avgs, exp_avg_sqs, copies of one shape; the scales of ceil(N / 256)
//          for N elements; all contiguous.
// Types    params f32, or all bf16; grads f32 or bf16, each its own; exp_avgs, exp_avg_sqs u8; scales f32; copies
//          bf16.
// None     copies, places (empty lists); max_norm. bf16 params have no copies.
// Aliasing none between tensors.
// Random   16 bits an element for bf16 params: Philox4x32-10 with key `seed` and counter (word group, 0, number of the
//          tensor, step); of a block of 256, words 0 .. 127 give their lower halves to the first 128 elements and
//          their upper halves to the others. A place is the tensor's number and its first element's position in a
//          larger tensor, a multiple of 256, from which word groups count; without, position in the list and 0.
// Sums     none but the norm's. A block whose largest m or v is below 1e-37 becomes zeros; v is held below 3.4e38, the scale of m
//          that is read below 1.8e38.
// Bits     equal for any thread count.
// Steps    as in adamw.h: f32 counts, moved on where the update is applied, and its number where none is given.
// CUDA     step, lr, grad_scale and grad_norm may be tensors there, as in adamw.h. Bits of moments may differ from the
//          processor's, those of the random rounding do not.
// Cost     without the norm (4 bytes): g, p, codes read, p, codes written, 16 bytes a parameter in f32 and 10 in
//          bf16; 60 flops.
// Errors   ValueError or TypeError on any violated line above, before anything is written.
#pragma once

#include <optional>
#include <utility>
#include <vector>

#include "core/step_number.h"

namespace gptcore {

struct Adamw8bitLists {
  const std::vector<TensorView>&params, &grads, &exp_avgs, &exp_avg_scales, &exp_avg_sqs, &exp_avg_sq_scales,
      &copies, &steps;
  const std::vector<double>& weight_decay;  // one entry per tensor
  const std::vector<std::pair<int64_t, int64_t>>& places;
};

struct Adamw8bitOptions {
  std::optional<StepNumber> step = 1;  // this update's number, from 1; none: one more than `steps` say
  StepNumber lr = 1e-3;
  double beta1 = 0.9, beta2 = 0.999, eps = 1e-8;
  bool maximize = false;
  std::optional<double> max_norm;
  StepNumber grad_scale = 1.0;
  uint64_t seed = 0;
};

// norm: of the gradients over grad_scale. Returns as grad_norm does.
std::pair<double, bool> adamw_8bit(const Adamw8bitLists& lists, const Adamw8bitOptions& options,
                                   const StepNumber& norm, const StepResult& result = {});

}  // namespace gptcore
