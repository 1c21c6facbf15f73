// The hyperbolic tangent of vectors, for soft-capped logits.
#pragma once

#include "core/simd.h"

namespace gptcore {
namespace GPTCORE_ISA_NS {

// e^x - 1 within 3 ulp of f32 for x of 0 to 40; NaN stays. The reduction and polynomial of exp(), whose 1 is
// kept apart: it would swallow the digits of a small x.
GPTCORE_INLINE Vec expm1_positive(Vec x) {
  const Vec magic = splat(12582912.0f);
  const Vec n = (x * 1.44269504088896341f + magic) - magic;
  Vec r = x - n * 0.693359375f;
  r = r - n * -2.12194440e-4f;
  Vec p = splat(0.001392617611993558f);
  p = p * r + 0.008363173074513711f;
  p = p * r + 0.041666554662050534f;
  p = p * r + 0.1666657702559799f;
  p = p * r + 0.5f;
  p = (r * r) * p + r;
  const Vec power = scale_by_power(splat(1.0f), n);
  return power * p + (power - 1.0f);
}

// tanh x within 5 ulp of f32, never beyond 1; NaN stays. tanh |x| = E / (E + 2), E = e^(2 |x|) - 1, which is
// 1 in f32 from |x| = 9.1 on.
GPTCORE_INLINE Vec tanh(Vec x) {
  const Vec e = expm1_positive(at_most(abs(x), 10.0f) * 2.0f);
  const VecU sign = (VecU)x & 0x80000000u;
  return (Vec)((VecU)at_most(e * reciprocal(e + 2.0f), 1.0f) | sign);
}

}  // namespace GPTCORE_ISA_NS
}  // namespace gptcore
