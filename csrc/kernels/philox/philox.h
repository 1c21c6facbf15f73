// Random bits by counter: Philox4x32-10 (Salmon et al. 2011), as core/philox.h gives them to other kernels.
//
//   out[n] = Philox(counters[n], (seed mod 2^32, seed div 2^32))
//
// Shapes   counters, out: (N, 4), contiguous; word 0 first.
// Types    int32, read and written as 32 unsigned bits; seed: 64 bits.
// Aliasing out may be counters, element for element.
// Bits     The published ones, equal on every machine.
// Cost     20 products of 32 by 32 bits a counter: 60 vector instructions for 16 words on AVX-512; 32 bytes.
// Errors   ValueError or TypeError on any violated line above, before anything is written.
#pragma once

#include "core/tensor_view.h"

namespace gptcore {

void philox(const TensorView& counters, int64_t seed, const TensorView& out);

}  // namespace gptcore
