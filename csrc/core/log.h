// The natural logarithm of vectors, for log-sum-exp.
#pragma once

#include "core/simd.h"

namespace gptcore {
namespace GPTCORE_ISA_NS {

// ln x within 2 ulp of f32; -inf for 0, inf for inf, NaN below 0 and for NaN. x = 2^n m with m in [0.7, 1.4],
// then ln m = 2 artanh s, s = (m - 1) / (m + 1), by its odd series to s^9 (the next term is below 2e-9 of the
// sum).
GPTCORE_INLINE Vec log(Vec x) {
  const VecI tiny = x < splat(1.17549435e-38f);
  const Vec scaled = tiny ? x * 8388608.0f : x;
  const VecI bits = (VecI)scaled - 0x3f3504f3;  // below sqrt(1/2) the exponent counts one less
  const Vec n = __builtin_convertvector(bits >> 23, Vec) - (tiny ? splat(23.0f) : splat(0.0f));
  const Vec m = (Vec)((bits & 0x7fffff) + 0x3f3504f3);
  const Vec f = m - 1.0f;
  const Vec s = f / (f + 2.0f), z = s * s;
  Vec p = splat(0.22222222f);
  p = p * z + 0.28571429f;
  p = p * z + 0.4f;
  p = p * z + 0.66666667f;
  // ln m = f - s (f - z p): f carries the leading digits exactly.
  Vec result = n * 0.693359375f + (f - (s * (f - z * p) - n * -2.12194440e-4f));
  const Vec infinity = splat(__builtin_inff());
  result = x == infinity ? infinity : result;
  result = x == splat(0.0f) ? -infinity : result;
  return x >= splat(0.0f) ? result : splat(__builtin_nanf(""));
}

}  // namespace GPTCORE_ISA_NS
}  // namespace gptcore
