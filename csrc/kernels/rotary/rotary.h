// Rotary position embedding (Su et al. 2021): pairs of a head's first R elements turn by an angle that grows
// with the position.
//
//   a' = a cos[p, i] - b sin[p, i]        b' = b cos[p, i] + a sin[p, i]          i < R/2
//   halves       (a, b) = x[i], x[i + R/2]  (GPT-NeoX, LLaMA)
//   interleaved  (a, b) = x[2i], x[2i + 1]  (GPT-J, the paper)
//   p = offset + t, or positions[b, t]; the elements from R on are copied. inverse: sin becomes -sin, which
//   is the transpose, hence the gradient.
//
// Shapes   x, out: (B, T, H, D) or (T, H, D), last dimension contiguous, any other strides; cos, sin: (L,
//          R/2), contiguous, R even, 2 <= R <= D; positions: (T) or (B, T), contiguous.
// Types    x, out of one type, f32 or bf16; cos, sin f32; positions int32.
// None     positions (then offset + T <= L).
// Aliasing out may be x, element for element.
// Bits     element by element: equal for any thread count and batch.
// Cost     3 flops and 2 * size bytes an element; the tables stay in cache.
// Errors   ValueError or TypeError on any violated line above or a position outside [0, L), before anything
//          is written. On CUDA positions are not read by the host: one outside [0, L) makes NaN of the pairs.
#pragma once

#include "core/tensor_view.h"

namespace gptcore {

void rotary(const TensorView& x, const TensorView& cos, const TensorView& sin, const TensorView& positions,
            int64_t offset, bool interleaved, bool inverse, const TensorView& out);

}  // namespace gptcore
