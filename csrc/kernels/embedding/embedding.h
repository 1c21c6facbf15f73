// Rows of a table by index, and the sum of gradients back into it.
//
//   out[n,c] = weight[ids[n], c]
//   dweight[v,c] = sum over n with ids[n] == v of grad_out[n,c]        (added to dweight where accumulating)
//
// Shapes   ids: (N), contiguous; weight: (V, C), last dimension contiguous; out, grad_out: (..., C) with N
//          rows; dweight: (V, C), contiguous.
// Types    ids int32 or int64; out like weight, f32 or bf16; grad_out f32 or bf16; dweight f32 or bf16.
// Aliasing none.
// Sums     f32, over the occurrences of an id in the order of n, one rounding at the end. On CUDA those of an id with
//          more than 128 go by chunks of 128, then over the chunks in order.
// Bits     equal for any thread count; a row of dweight depends on its own occurrences only.
// Cost     forward NC elements read and written. Backward NC read and VC written (zeros included);
//          accumulating reads and writes only the rows that occur. Plus 4(V + N) bytes of scratch for the
//          counting sort; on CUDA 4V + 16N and two f32 rows for every 128 of N.
// Errors   ValueError or TypeError on any violated line above or an id outside [0, V), before anything is
//          written. On CUDA ids are not read by the host: one outside gives a row of NaN, and its gradient is left
//          out.
#pragma once

#include "core/tensor_view.h"

namespace gptcore {

void embedding_forward(const TensorView& ids, const TensorView& weight, const TensorView& out);

void embedding_backward(const TensorView& ids, const TensorView& grad_out, const TensorView& dweight,
                        bool accumulate);

}  // namespace gptcore
