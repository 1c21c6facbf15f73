// The Euclidean norm of many tensors together, and whether all their elements are finite.
//
//   norm = sqrt(sum over all tensors of (g / grad_scale)^2)
//
// Shapes   any, contiguous; an empty list has norm 0.
// Types    f32 or bf16, each its own.
// Result   (norm, found_inf). Where an element is inf or NaN, found_inf is true and the norm is not finite.
// Sums     squares in f32 over fixed chunks, chunks in f64 in order; a chunk whose squares leave the range of
//          f32 is summed in f64.
// Bits     equal for any thread count; those of one list, whatever calls its tensors take part in later.
// Cost     one read of g; 2 flops an element.
// Errors   ValueError or TypeError on any violated line above.
#pragma once

#include <utility>
#include <vector>

#include "core/tensor_view.h"

namespace gptcore {

// op: whose name errors bear.
std::pair<double, bool> grad_norm(const std::vector<TensorView>& grads, double grad_scale, const char* op);

}  // namespace gptcore
