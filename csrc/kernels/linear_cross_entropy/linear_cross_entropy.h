// The vocabulary projection with its cross-entropy loss; the logits are never whole in memory.
//
//   l[n,v] = cap(logit_scale * (sum_c x[n,c] * weight[v,c] + bias[v]))     lse[n] = log sum_v exp l[n,v]
//   cap(a) = soft_cap * tanh(a / soft_cap), or a
//   loss[n] = w[n] * ((1 - s) * u[t] * (lse[n] - l[n,t]) + s/V * sum_v u[v] * (lse[n] - l[n,v]))
//             with t = targets[n], s = label_smoothing, u = class_weight, or ones
//   z[n] = w[n] * z_loss * lse[n]^2         logprobs[n] = l[n,t] - lse[n]         w = token_weight, or 1
//   mean: of the loss, the sum over the kept rows divided by their sum of w[n] * u[t]; of z, by that of w
//   sum; none: per row
//   entropy[n] = -sum_v p[n,v] log p[n,v]         predicted[n] = the first v with the largest l[n,v]
//   dl[n,v] = g[n] * w[n] * ((1-s) * u[t] * (p[n,v] - [v = t]) + s/V * (p[n,v] * sum(u) - u[v]))
//             + gz[n] * w[n] * 2 * z_loss * lse[n] * p[n,v],      p = exp(l - lse)
//   da = dl * (1 - (l / soft_cap)^2), or dl
//   dx = logit_scale * da weight     dweight = logit_scale * da^T x     dbias = logit_scale * da^T 1
//
// Shapes   x: (N, C), rows of any stride; weight: (V, C), likewise; targets: (N) int64, in [0, V) or
//          ignore_index; token_weight: (N); bias, class_weight: (V); loss, z: () for mean and sum, (N) for
//          none; logprobs, lse, entropy, predicted: (N); gradients as their tensors.
// Types    x and weight f32 or bf16 (both bf16: bf16 products summed in f32, gradients of logits rounded to
//          bf16; else f32 products); bias and class_weight f32 or bf16; token_weight, loss, z, logprobs, lse,
//          entropy and gradients of the losses f32; predicted int64; dx of x's type; dweight and dbias f32 or
//          the type of what they belong to, rounded once.
// Ignored  rows with ignore_index take no part: loss, z, logprobs, lse, entropy and dx are 0 there, predicted
//          is -1, and no work is done. A weight of 0 does the work: the row has logprobs and lse.
// Mean     no row kept: NaN with gradients of 0. Weights that add up to 0 are divided by all the same: NaN or
//          infinity, gradients too.
// Soft cap a number above 0 which, like its reciprocal, f32 holds without loss of digits.
// Slice    num_classes above 0: weight and bias are those of the V classes from first_class on, of num_classes, and
//          targets count in all of these, which are what s is spread over. Then with t in the slice or none:
//            loss[n] = -w[n] * ((1 - s) * l[n,t] + s/num_classes * sum_v l[n,v])     logprobs[n] = l[n,t], or 0
//          and lse, entropy, predicted and z are of the slice: over all slices losses add up to the loss without
//          w[n] * lse[n], logprobs to l[n,t], and exp(lse) to that of all classes, which backward is given. Its
//          gradients are those of the slice's part of the whole loss. For reduction none, without class_weight.
// None     logit_soft_cap: no cap; bias: zeros; token_weight, class_weight: ones, and no gradient anyway;
//          grad_loss, grad_z: zero; entropy, predicted (neither is differentiated), dx, dweight, dbias: not
//          wanted.
// At once  forward with dx, dweight or dbias (mean or sum; x and weight f32, or bf16 and N at most 512) makes
//          the gradients for gradients of 1 of loss and z, by chunks of tokens whose logits it keeps: the
//          bits of backward with those.
// Aliasing outputs overlap nothing. dx and dbias are overwritten; dweight is overwritten, or by backward
//          added to (f32 only).
// Bits     lse, logprobs, entropy and predicted of a row depend on that row, weight and what modifies its
//          logits only; dx of a row on its gradients too. Sums run in an order fixed by shapes: the same bits
//          on every thread count.
// Cost     forward 2NCV flops; backward 6NCV (2NCV of it the logits again), N counting kept rows;
//          exponentials 2NV, with a soft cap 4NV. Forward with gradients 6NCV, for it weight is read 2N/T
//          times and dweight N/T times (and written as often), T = min(512, N) tokens of a chunk.
//          Scratch in bytes, e = 2 for bf16 products, else 4: forward NCe + NV/32 (smoothing: NV/64 more,
//          entropy or predicted: NV/32 more) (and a packed block of weight of at most 512 KB per thread);
//          backward 2NCe + 4NC + 2SNe + 2SCe for stretches of S = min(1024, V/32) words of the vocabulary, at
//          least 256; forward with gradients 4TV + 8TC + 8ST and a packed block of weight per thread; 4V each
//          for dbias, for class_weight in bf16, for bias unless it is f32 and unscaled.
// Errors   ValueError or TypeError on any violated line above, before anything is written.
#pragma once

#include <optional>
#include <string>

#include "core/tensor_view.h"

namespace gptcore {

struct LinearCrossEntropyOptions {
  int64_t ignore_index;
  double label_smoothing, z_loss, logit_scale;
  std::string reduction;  // mean, sum or none
  TensorView token_weight, bias, class_weight;
  std::optional<double> logit_soft_cap;
  int64_t first_class = 0, num_classes = 0;
};

struct LinearCrossEntropyOutputs {
  TensorView loss, z, logprobs, lse, entropy, predicted;
};

struct LinearCrossEntropyGradients {
  TensorView dx, dweight, dbias;
};

void linear_cross_entropy_forward(const TensorView& x, const TensorView& weight, const TensorView& targets,
                                  const LinearCrossEntropyOptions& options,
                                  const LinearCrossEntropyOutputs& outputs,
                                  const LinearCrossEntropyGradients& gradients);

// accumulate: gradients.dweight is added to.
void linear_cross_entropy_backward(const TensorView& grad_loss, const TensorView& grad_z, const TensorView& x,
                                   const TensorView& weight, const TensorView& targets, const TensorView& lse,
                                   const LinearCrossEntropyOptions& options,
                                   const LinearCrossEntropyGradients& gradients, bool accumulate);

}  // namespace gptcore
