// The cyclic redundancy check CRC-32C of an array's bytes, and a copy of them in the same pass.
//
//   b = the bytes of `initial`'s message, then those of x, as a polynomial over GF(2), bit 0 of each byte first
//   crc = complement of the remainder of (b x^32 + the complemented first 32 bits) by
//         P = x^32 + x^28 + x^27 + x^26 + x^25 + x^23 + x^22 + x^20 + x^19 + x^18 + x^14 + x^13 + x^11 + x^10 + x^9
//             + x^8 + x^6 + 1            (Castagnoli, Bräuer and Herrmann 1993; RFC 3720, appendix B.4)
//
// Shapes   x any, contiguous, of n bytes; out, if given, contiguous and of n bytes.
// Types    any of core/dtype.h; initial: the CRC of what came before x, 0 for nothing.
// Aliasing out may not share memory with x.
// Result   32 bits; out holds x's bytes.
// Bits     those of the standard ("123456789" gives e3069283), for any thread count and instruction set.
// Cost     one read of x, one write of out; 8 bytes a cycle and core.
// Errors   ValueError or TypeError on any violated line above, before anything is written.
#pragma once

#include "core/tensor_view.h"

namespace gptcore {

uint32_t crc32c(const TensorView& x, uint32_t initial, const TensorView& out);

}  // namespace gptcore
