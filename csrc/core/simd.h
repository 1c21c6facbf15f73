// Vectors of f32 for kernel bodies, on GCC vector extensions: the same source becomes SSE, AVX2, AVX-512 or
// whatever the target has. Everything here is forced inline and lives in the namespace of the ISA being
// compiled, so no copy built for AVX-512 can be linked into code for older machines.
//
// Tails: load_n / store_n touch only n lanes, so a kernel has one body and no scalar remainder formula.
#pragma once

#include <cstddef>
#include <cstdint>

#include "core/dtype.h"

#if defined(__AVX512F__) || defined(__AVX2__)
#include <immintrin.h>
#endif

#define GPTCORE_INLINE static inline __attribute__((always_inline, unused))

namespace gptcore {
namespace GPTCORE_ISA_NS {

#if defined(__AVX512F__)
constexpr int kLanes = 16;
#elif defined(__AVX2__)
constexpr int kLanes = 8;
#else
constexpr int kLanes = 4;
#endif

typedef float Vec __attribute__((vector_size(kLanes * 4)));
typedef int32_t VecI __attribute__((vector_size(kLanes * 4)));
typedef uint32_t VecU __attribute__((vector_size(kLanes * 4)));
typedef uint16_t VecH __attribute__((vector_size(kLanes * 2)));
typedef float VecUnaligned __attribute__((vector_size(kLanes * 4), aligned(4), may_alias));
typedef uint16_t VecHUnaligned __attribute__((vector_size(kLanes * 2), aligned(2), may_alias));

GPTCORE_INLINE Vec splat(float x) { return x - Vec{}; }
GPTCORE_INLINE VecI splat_int(int32_t x) { return x - VecI{}; }

// Lanes 0, 1, 2, ...
GPTCORE_INLINE VecI lane_index() {
  VecI index = {};
  for (int i = 0; i < kLanes; ++i) index[i] = i;
  return index;
}

// a where a > b, else b; with a NaN in either, b (as MAXPS does).
GPTCORE_INLINE Vec max(Vec a, Vec b) { return a > b ? a : b; }
GPTCORE_INLINE Vec min(Vec a, Vec b) { return a < b ? a : b; }

// x held above or below a limit; NaN stays. MAXPS and MINPS give their second operand where either is NaN.
GPTCORE_INLINE Vec at_least(Vec x, float limit) {
#if defined(__AVX512F__)
  return (Vec)_mm512_max_ps((__m512)splat(limit), (__m512)x);
#else
  return x < splat(limit) ? splat(limit) : x;
#endif
}
GPTCORE_INLINE Vec at_most(Vec x, float limit) {
#if defined(__AVX512F__)
  return (Vec)_mm512_min_ps((__m512)splat(limit), (__m512)x);
#else
  return x > splat(limit) ? splat(limit) : x;
#endif
}
GPTCORE_INLINE Vec clamp(Vec x, float limit) { return at_least(at_most(x, limit), -limit); }

GPTCORE_INLINE Vec abs(Vec x) { return (Vec)((VecU)x & 0x7fffffffu); }
GPTCORE_INLINE Vec copy_sign(Vec magnitude, Vec sign) {
  return (Vec)(((VecU)magnitude & 0x7fffffffu) | ((VecU)sign & 0x80000000u));
}
GPTCORE_INLINE Vec sqrt(Vec x) {
#if defined(__AVX512F__)
  return (Vec)_mm512_sqrt_ps((__m512)x);
#elif defined(__AVX2__)
  return (Vec)_mm256_sqrt_ps((__m256)x);
#else
  for (int i = 0; i < kLanes; ++i) x[i] = __builtin_sqrtf(x[i]);
  return x;
#endif
}

// --- bf16 conversion: exact up, round to nearest even down; NaN stays NaN
// -----------------------------------

GPTCORE_INLINE Vec widen(VecH x) { return (Vec)(__builtin_convertvector(x, VecU) << 16); }

GPTCORE_INLINE VecH narrow(Vec x) {
#if defined(__AVX512BF16__)
  return (VecH)_mm512_cvtneps_pbh((__m512)x);
#else
  const VecU bits = (VecU)x;
  const VecU rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  const VecU quiet = (bits >> 16) | 0x40u;
  return __builtin_convertvector((VecU)(x == x ? (VecI)rounded : (VecI)quiet), VecH);
#endif
}

GPTCORE_INLINE float widen(bf16 x) {
  const uint32_t bits = uint32_t{x.bits} << 16;
  float value;
  __builtin_memcpy(&value, &bits, 4);
  return value;
}

GPTCORE_INLINE bf16 narrow(float x) { return bf16{narrow(splat(x))[0]}; }

// --- memory ------------------------------------------------------------------------------------------------

GPTCORE_INLINE Vec load(const float* p) { return *reinterpret_cast<const VecUnaligned*>(p); }
GPTCORE_INLINE Vec load(const bf16* p) { return widen((VecH) * reinterpret_cast<const VecHUnaligned*>(p)); }
GPTCORE_INLINE void store(float* p, Vec x) { *reinterpret_cast<VecUnaligned*>(p) = x; }
GPTCORE_INLINE void store(bf16* p, Vec x) { *reinterpret_cast<VecHUnaligned*>(p) = narrow(x); }

// The first n lanes (0 <= n <= kLanes); the others load as zero and are not stored.
GPTCORE_INLINE Vec load_n(const float* p, int64_t n) {
#if defined(__AVX512F__)
  return (Vec)_mm512_maskz_loadu_ps(static_cast<__mmask16>((1u << n) - 1u), p);
#else
  Vec x = {};
  __builtin_memcpy(&x, p, static_cast<size_t>(n) * 4);
  return x;
#endif
}
GPTCORE_INLINE Vec load_n(const bf16* p, int64_t n) {
#if defined(__AVX512F__)
  return widen((VecH)_mm256_maskz_loadu_epi16(static_cast<__mmask16>((1u << n) - 1u), p));
#else
  VecH x = {};
  __builtin_memcpy(&x, p, static_cast<size_t>(n) * 2);
  return widen(x);
#endif
}
GPTCORE_INLINE void store_n(float* p, Vec x, int64_t n) {
#if defined(__AVX512F__)
  _mm512_mask_storeu_ps(p, static_cast<__mmask16>((1u << n) - 1u), (__m512)x);
#else
  __builtin_memcpy(p, &x, static_cast<size_t>(n) * 4);
#endif
}
GPTCORE_INLINE void store_n(bf16* p, Vec x, int64_t n) {
  const VecH h = narrow(x);
#if defined(__AVX512F__)
  _mm256_mask_storeu_epi16(p, static_cast<__mmask16>((1u << n) - 1u), (__m256i)h);
#else
  __builtin_memcpy(p, &h, static_cast<size_t>(n) * 2);
#endif
}

// x with lanes from n on replaced by `fill`.
GPTCORE_INLINE Vec keep_n(Vec x, int64_t n, float fill) {
  return lane_index() < splat_int(static_cast<int32_t>(n)) ? x : splat(fill);
}

// Calls body(offset, n) over [0, size) in steps of kLanes; n is kLanes but for the last step. Full steps see
// a constant n, so the compiler drops their masks.
template <class F>
GPTCORE_INLINE void for_lanes(int64_t size, const F& body) {
  int64_t i = 0;
  for (; i + kLanes <= size; i += kLanes) body(i, int64_t{kLanes});
  if (i < size) body(i, size - i);
}

template <class T>
GPTCORE_INLINE Vec load_some(const T* p, int64_t n) {
  return n == kLanes ? load(p) : load_n(p, n);
}
template <class T>
GPTCORE_INLINE void store_some(T* p, Vec x, int64_t n) {
  if (n == kLanes) {
    store(p, x);
  } else {
    store_n(p, x, n);
  }
}

// --- sums over lanes, always in the same tree --------------------------------------------------------------

// Lane i gets lane i + width, for halving: what follows the first `width` lanes is not used.
template <int width>
GPTCORE_INLINE Vec upper(Vec x) {
#if defined(__clang__)
  Vec y = x;
  for (int i = 0; i < width; ++i) y[i] = x[i + width];
  return y;
#else
  return __builtin_shuffle(x, (lane_index() + width) & (kLanes - 1));
#endif
}

GPTCORE_INLINE float reduce_add(Vec x) {
#if defined(__AVX512F__)
  x += upper<8>(x);
#endif
#if defined(__AVX2__)
  x += upper<4>(x);
#endif
  x += upper<2>(x);
  x += upper<1>(x);
  return x[0];
}
GPTCORE_INLINE float reduce_max(Vec x) {
#if defined(__AVX512F__)
  x = max(x, upper<8>(x));
#endif
#if defined(__AVX2__)
  x = max(x, upper<4>(x));
#endif
  x = max(x, upper<2>(x));
  x = max(x, upper<1>(x));
  return x[0];
}

// --- functions ---------------------------------------------------------------------------------------------

// 2^n for whole n; results below the normal range go through two factors.
GPTCORE_INLINE Vec scale_by_power(Vec x, Vec n) {
#if defined(__AVX512F__)
  return (Vec)_mm512_scalef_ps((__m512)x, (__m512)n);
#else
  const VecI whole = __builtin_convertvector(n, VecI);
  const VecI half = whole >> 1;
  return x * (Vec)((half + 127) << 23) * (Vec)((whole - half + 127) << 23);
#endif
}

// e^x, within 1 ulp of f32; 0 for -inf, inf above 88.7, NaN stays. Cody-Waite reduction to |r| <= ln2/2, then
// 1 + r + r^2 p(r) with p of degree 4 (Chebyshev fit, relative error 3e-8 before rounding).
GPTCORE_INLINE Vec exp(Vec x) {
  x = at_most(at_least(x, -104.0f), 89.0f);
  const Vec magic = splat(12582912.0f);  // 1.5 * 2^23: adding it leaves the rounded integer in the low bits
  const Vec n = (x * 1.44269504088896341f + magic) - magic;
  Vec r = x - n * 0.693359375f;
  r = r - n * -2.12194440e-4f;
  Vec p = splat(0.001392617611993558f);
  p = p * r + 0.008363173074513711f;
  p = p * r + 0.041666554662050534f;
  p = p * r + 0.1666657702559799f;
  p = p * r + 0.5f;
  p = (r * r) * p + r + 1.0f;
  return scale_by_power(p, n);
}

// 1 / x within 1 ulp, for x of moderate size (not inf, not near the ends of f32's range). The divider takes
// 16 cycles for 16 lanes; a 14-bit estimate and one Newton step (error 2^-28 before rounding) take 4.
GPTCORE_INLINE Vec reciprocal(Vec x) {
#if defined(__AVX512F__)
  const Vec r = (Vec)_mm512_rcp14_ps((__m512)x);
  return r + r * (1.0f - x * r);
#else
  return 1.0f / x;
#endif
}

// s = 1 / (1 + e^-x) and *other = 1 - s, both without cancellation: from t = e^-|x|, which cannot overflow.
GPTCORE_INLINE Vec sigmoid(Vec x, Vec* other) {
  const Vec t = exp(-abs(x));
  const Vec large = reciprocal(t + 1.0f), small = t * large;
  *other = x < splat(0.0f) ? large : small;
  return x < splat(0.0f) ? small : large;
}
GPTCORE_INLINE Vec sigmoid(Vec x) {
  Vec other;
  return sigmoid(x, &other);
}

// tanh x = 1 - 2 / (e^2x + 1); near zero, where that cancels, the odd Taylor polynomial (|x| < 0.25: error <
// 1 ulp).
GPTCORE_INLINE Vec tanh(Vec x) {
  const Vec large = 1.0f - 2.0f / (exp(2.0f * x) + 1.0f);
  const Vec s = x * x;
  Vec p = s * 0.02186948853615520f - 0.05396825396825397f;
  p = p * s + 0.13333333333333333f;
  p = p * s - 0.33333333333333333f;
  const Vec small = x + x * s * p;
  return abs(x) < splat(0.25f) ? small : large;
}

// erf x, within 1 ulp. Below 1: x + x p(x^2), p of degree 6 (relative error of the fit 1.2e-9). From 1 on:
// 1 - e^-q(x), q of degree 6 fitted to -log erfc on [0.99, 3.93] with weight erfc/erf (1.1e-9); from 3.93 on
// that is 1. Both by least squares on Chebyshev nodes, reweighted until the error levels (Lawson); the
// constant of p is 2/sqrt(pi) - 1, so that the leading term x is exact and p's rounding enters at an eighth.
GPTCORE_INLINE Vec erf(Vec x) {
  const Vec s = x * x;
  Vec p = splat(7.85385927e-05f);
  p = p * s - 0.000801019299f;
  p = p * s + 0.00518832761f;
  p = p * s - 0.0268538119f;
  p = p * s + 0.112835851f;
  p = p * s - 0.376126258f;
  p = p * s + 0.128379166f;
  const Vec small = x * p + x;
  const Vec a = abs(x);
  const Vec z = at_most(a, 3.93f);
  Vec q = splat(-0.000187605216f);
  q = q * z + 0.00296011814f;
  q = q * z - 0.0218896577f;
  q = q * z + 0.103218234f;
  q = q * z + 0.638012182f;
  q = q * z + 1.12717167f;
  q = q * z + 0.000320569273f;
  const Vec large = copy_sign(1.0f - exp(-q), x);
  return a < splat(1.0f) ? small : large;
}

}  // namespace GPTCORE_ISA_NS
}  // namespace gptcore
