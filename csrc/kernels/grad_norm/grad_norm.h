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
// Cost     one read of g; 2 flops an element.
// Errors   ValueError or TypeError on any violated line above.
#pragma once

#include <utility>
#include <vector>

#include "core/tensor_view.h"

namespace gptcore {

// op: whose name errors bear.
std::pair<double, bool> grad_norm(const std::vector<TensorView>& grads, double grad_scale, const char* op);

bool square_sums(const std::vector<TensorView>& grads, int64_t block, double grad_scale,
                 const TensorView& sums);

// How many blocks there are.
int64_t square_blocks(const std::vector<TensorView>& grads, int64_t block);

}  // namespace gptcore
