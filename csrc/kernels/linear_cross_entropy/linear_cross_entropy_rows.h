// linear_cross_entropy on a device, where the products are a library's: what lies between them, for some tokens at a
// time. linear_cross_entropy.h says what is computed; the caller, who makes the products, is ops/.
//
//   check      everything that linear_cross_entropy_forward or _backward would refuse, and nothing else
//   divisors   (3) f64: of the loss and of z for "mean", else 1; the sum of class_weight
//   rows       from products (n, V) = x weight^T, f32: outputs by token, and the gradient by the products
//   totals     loss and z from the rows' own
//
// Shapes   products, dlogits: (n, V), rows of any stride; targets, token_weight and what is by token: the chunk's (n);
//          row_loss, row_z: (n) f64. options.reduction says whose gradients these are: of each token or of all.
// Types    products f32; dlogits f32 or bf16.
// None     any output; grad_loss and grad_z, which then count as `missing`.
// Wrong    targets outside [0, V) make their row NaN: the host does not see them.
// Bits     everything of a row depends on its products alone.
// Aliasing dlogits overlaps nothing.
#pragma once

#include "kernels/linear_cross_entropy/linear_cross_entropy.h"

namespace gptcore {

struct LinearCrossEntropyRows {
  TensorView divisors, row_loss, row_z, logprobs, lse, entropy, predicted;
  bool lse_given;  // lse is read, not written, and there are no outputs but dlogits
  TensorView grad_loss, grad_z;
  double missing;
  TensorView dlogits;
};

// Where x lies on a device; false: linear_cross_entropy_forward does it all.
void linear_cross_entropy_check(const TensorView& x, const TensorView& weight, const TensorView& targets,
                                const LinearCrossEntropyOptions& options,
                                const LinearCrossEntropyOutputs& outputs,
                                const LinearCrossEntropyGradients& gradients);

void linear_cross_entropy_divisors(const TensorView& targets, int64_t classes,
                                   const LinearCrossEntropyOptions& options, const TensorView& divisors);

void linear_cross_entropy_rows(const TensorView& products, const TensorView& targets,
                               const LinearCrossEntropyOptions& options, const LinearCrossEntropyRows& rows);

void linear_cross_entropy_totals(const TensorView& row_loss, const TensorView& row_z,
                                 const TensorView& divisors, const TensorView& loss, const TensorView& z);

}  // namespace gptcore
