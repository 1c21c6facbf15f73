// The products of all experts of a mixture-of-experts layer, whose rows are sorted by expert.
//
//   forward    y[r]       = x[r] weight[e]^T (+ bias[e])          offsets[e] <= r < offsets[e + 1]
//   backward   dx[r]      = dy[r] weight[e]
//              dweight[e] (+)= sum_r dy[r]^T x[r]
//              dbias[e]   = sum_r dy[r]
//
// Shapes   x, dx: (M, Cin); weight, dweight: (E, Cout, Cin); y, dy: (M, Cout); bias, dbias: (E, Cout) or none;
//          offsets: (E + 1), offsets[0] = 0, not falling, offsets[E] <= M. Rows of y and dx from offsets[E] on are
//          zero; groups may be empty, and then dweight and dbias are.
// Layout   weight, dweight, bias, dbias and offsets contiguous; of x, dx, y and dy the last dimension, any row stride.
// Types    x, weight, y, dy and dx of one type, f32 or bf16; bias, dbias, dweight of that type or f32; offsets i32.
// Aliasing outputs overlap no input and no other output.
// Left out groups of more than `largest` rows (in backward: of `largest_dx` for dx, of `largest_dweight` for dweight)
//          are another library's: their part of the result is neither read nor written. Everything is checked all
//          the same, and dbias is all groups'. On CUDA none is left out.
// Gradients overwritten; with accumulate dweight is added to what it holds (in f32, then rounded once to its type).
// Sums     f32 throughout, rounded once to the result's type.
// Bits     An element of y is one chain over Cin, one of dx over Cout, in an order that the depth alone fixes: it
//          depends on its row, its expert's weight, the type and the ISA, and on nothing else: not on M, E, offsets, the
//          row's place, on what rows its expert has or on threads. (The rows of one expert alone, or of all experts
//          spread over processes, give the same bits.) Elements of dweight and dbias are chains over the expert's rows
//          in their order (dbias on CUDA of every eighth row, eight chains added in order). With AMX or AVX512-BF16 subnormal bf16 inputs of products count as zero.
// Cost     2 M Cin Cout flops for each of y, dx and dweight; each reads or writes all of the weight that has rows once:
//          E Cin Cout size bytes, which is what bounds it with few rows for each expert.
// Errors   ValueError or TypeError on any violated line above, before anything is written. On CUDA offsets are
//          not read for that: what of a group lies outside the rows is left out. There are 16,384 experts at most.
#pragma once

#include <cstdint>

#include "core/tensor_view.h"

namespace gptcore {

constexpr int64_t kAnyGroup = INT64_MAX;  // leaves none out

void grouped_linear(const TensorView& x, const TensorView& weight, const TensorView& offsets,
                    const TensorView& bias, const TensorView& out, int64_t largest = kAnyGroup);

// Any of dx, dweight and dbias may be none; x may where dweight is.
void grouped_linear_backward(const TensorView& dy, const TensorView& x, const TensorView& weight,
                             const TensorView& offsets, const TensorView& dx, const TensorView& dweight,
                             const TensorView& dbias, bool accumulate, int64_t largest_dx = kAnyGroup,
                             int64_t largest_dweight = kAnyGroup);

}  // namespace gptcore
