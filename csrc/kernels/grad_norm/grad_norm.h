// The Euclidean norm of many tensors together, and whether all their elements are finite; or the sums of squares of
// their blocks, from which several owners of slices make one norm.
//
//   norm = sqrt(sum over all tensors of (g / grad_scale)^2)
//   sums[j] = sum over block j of (g / grad_scale)^2
//
// Shapes   grads any, contiguous; an empty list has norm 0. Blocks are `block` neighbours in memory; the last one of
//          a tensor may be shorter. sums (blocks of all tensors, in order).
// Types    grads f32 or bf16, each its own; sums f64.
// Result   (norm, found_inf), or found_inf. Where an element is inf or NaN, found_inf is true and the norm and its
//          block's sum are not finite.
// Sums     squares in f32 over at most 16384 elements of a tensor or block, in f64 beyond, in order; what leaves the
//          range of f32 is summed in f64.
// Bits     equal for any thread count; those of one list, whatever calls its tensors take part in later. Those of a
//          block depend on its elements alone: slices of a tensor that begin with a block have the whole's.
// CUDA     all of it there: grad_scale may lie on the device, and the result is written to it. Four squares add up in
//          f32, all else in f64 in an order that the shapes fix; found_inf is what the norm or the sums tell.
// Cost     one read of g; 2 flops an element.
// Errors   ValueError or TypeError on any violated line above.
#pragma once

#include <utility>
#include <vector>

#include "core/step_number.h"

namespace gptcore {

// op: whose name errors bear. What is returned is of no use where the gradients lie on a device: `result` has it.
std::pair<double, bool> grad_norm(const std::vector<TensorView>& grads, const StepNumber& grad_scale,
                                  const char* op, const StepResult& result = {});

// found_inf: one bool, as in StepResult; None where it is returned alone.
bool square_sums(const std::vector<TensorView>& grads, int64_t block, const StepNumber& grad_scale,
                 const TensorView& sums, const TensorView& found_inf = {});

// How many blocks there are.
int64_t square_blocks(const std::vector<TensorView>& grads, int64_t block);

}  // namespace gptcore
