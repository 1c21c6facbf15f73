// Matrix products where libraries are weak: a fixed-order product for few rows (decoding), and bf16 x bf16
// into f32 with accumulation (weight gradients), which torch refuses on the CPU.
//
//   out[m,n] (+)= sum_k a[m,k] * b[k,n] (+ bias[n])
//
// Shapes   a: (M, K), or (K, M) with transpose_a; b: (K, N), or (N, K) with transpose_b; out: (M, N);
//          bias: (N), contiguous, or none.
// Layout   one dimension of a and of b contiguous, the other of any stride; rows of out contiguous, any row
//          stride.
// Types    a and b of one type, f32 or bf16; out and bias of that type or f32. accumulate needs an f32 out and takes no
//          bias.
// Aliasing out overlaps no input.
// Sums     f32 throughout; a bf16 out is rounded once.
// Bits     An element of out depends on its row of a, its column of b, K, the layouts and on which body
//          serves: for M <= 64 and rows of a contiguous one with b transposed and one with b as it is, but for
//          M = 1 with b as it is another one, and one for the rest. It does not depend on M otherwise, on N, on
//          its position, or on the number of threads. With AMX or AVX512-BF16 subnormal bf16 inputs may count as
//          zero, but not for M = 1 with b as it is.
// Cost     2MNK flops; for few rows K * N * size bytes read once, which bounds it. Otherwise a and b are
//          packed in blocks: at most 4096 rows and columns times 1024 (bf16) or 512 (f32) of depth of
//          scratch, unless out is bf16, which takes the whole depth.
// Errors   ValueError or TypeError on any violated line above, before anything is written.
#pragma once

#include "core/tensor_view.h"

namespace gptcore {

void matmul(const TensorView& a, const TensorView& b, const TensorView& bias, const TensorView& out,
            bool accumulate, bool transpose_a, bool transpose_b);

}  // namespace gptcore
