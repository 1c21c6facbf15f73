// Tokens to their experts and back, by the rows that moe_router gives: permutations, no one-hot matrices.
//
//   dispatch: out[rows[n,k],c] = x[n,c]                   rows of out from offsets[E] on are 0
//   combine:  out[n,c] = sum_k gates[n,k] y[rows[n,k],c]  over the choices with a row; 0 without any
//   combine's gradients: dy[rows[n,k],c] = gates[n,k] dout[n,c], rows from offsets[E] on 0;
//                        dgates[n,k] = sum_c dout[n,c] y[rows[n,k],c], 0 without a row
//   (dispatch's gradient is combine without gates)
//
// Shapes   x, dout, combine's out: (N, C); dispatch's out, y, dy: (M, C), rows of any stride; rows, gates, dgates:
//          (N, K), K <= 64; offsets: (E + 1), of which the last counts.
// Types    f32 or bf16, one for all of a call; rows, offsets int32; gates, dgates f32.
// None     gates: all 1; offsets in combine, which only looks whether they fit.
// Layout   rows, gates, dgates, offsets contiguous.
// Rows     -1 or from 0 to M - 1, each at most once, and offsets[E] of them, from 0 on.
// Aliasing none.
// Sums     f32, over k in its order, rounded once.
// Bits     each row from its own inputs: the same on every thread count and in any batch.
// Cost     dispatch N C read, M C written; combine N K C read, N C written; its backward 2 N K C read, M C written.
// Errors   ValueError or TypeError on any violated line above but a row that is given twice, before anything is
//          written. On CUDA rows and offsets are not read for that: a row outside is left out.
#pragma once

#include "core/tensor_view.h"

namespace gptcore {

void moe_dispatch_forward(const TensorView& x, const TensorView& rows, const TensorView& offsets,
                          const TensorView& out);

void moe_combine_forward(const TensorView& y, const TensorView& rows, const TensorView& gates,
                         const TensorView& offsets, const TensorView& out);

void moe_combine_backward(const TensorView& dout, const TensorView& y, const TensorView& rows,
                          const TensorView& gates, const TensorView& offsets, const TensorView& dy,
                          const TensorView& dgates);

}  // namespace gptcore
