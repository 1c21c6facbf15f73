// Vectors of f32 for kernel bodies, on GCC vector extensions: the same source becomes SSE, AVX2, AVX-512 or
// whatever the target has. Everything here is forced inline and lives in the namespace of the ISA being
// compiled, so no copy built for AVX-512 can be linked into code for older machines.
//
// Tails: load_n / store_n touch only n lanes, so a kernel has one body and no scalar remainder formula.
#pragma once

#include <cstddef>
#include <cstdint>

#include "core/dtype.h"

#if defined(__SSE2__)
#include <immintrin.h>
#endif

// Sanitizers follow plain loads and stores, not intrinsics with masks or hints.
#if defined(__AVX512F__) && !defined(__SANITIZE_ADDRESS__) && !defined(__SANITIZE_THREAD__)
#define GPTCORE_MASKS 1
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

// --- bf16 conversion: exact up, round to nearest even down; NaN stays NaN ----------------------------------

// GCC 12 converts whole vectors half by half, five instructions in place of one, hence the intrinsics.
GPTCORE_INLINE VecU zero_extend(VecH x) {
#if defined(__AVX512F__)
  return (VecU)_mm512_cvtepu16_epi32((__m256i)x);
#elif defined(__AVX2__)
  return (VecU)_mm256_cvtepu16_epi32((__m128i)x);
#else
  return __builtin_convertvector(x, VecU);
#endif
}

GPTCORE_INLINE Vec widen(VecH x) { return (Vec)(zero_extend(x) << 16); }

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
#if defined(GPTCORE_MASKS)
  return (Vec)_mm512_maskz_loadu_ps(static_cast<__mmask16>((1u << n) - 1u), p);
#else
  Vec x = {};
  __builtin_memcpy(&x, p, static_cast<size_t>(n) * 4);
  return x;
#endif
}
GPTCORE_INLINE Vec load_n(const bf16* p, int64_t n) {
#if defined(GPTCORE_MASKS)
  return widen((VecH)_mm256_maskz_loadu_epi16(static_cast<__mmask16>((1u << n) - 1u), p));
#else
  VecH x = {};
  __builtin_memcpy(&x, p, static_cast<size_t>(n) * 2);
  return widen(x);
#endif
}
GPTCORE_INLINE void store_n(float* p, Vec x, int64_t n) {
#if defined(GPTCORE_MASKS)
  _mm512_mask_storeu_ps(p, static_cast<__mmask16>((1u << n) - 1u), (__m512)x);
#else
  __builtin_memcpy(p, &x, static_cast<size_t>(n) * 4);
#endif
}
GPTCORE_INLINE void store_n(bf16* p, Vec x, int64_t n) {
  const VecH h = narrow(x);
#if defined(GPTCORE_MASKS)
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

// 2^u within 2 ulp of f32, for u up to 127.9; 0 below -150, NaN stays. 2^floor(u) p(u - floor u) with p of
// degree 5, p(0) = 1 (relative error 8.3e-8, levelled by reweighted least squares). Half the instructions of
// exp(): AVX-512 takes the fraction in one, scales by the floor of what it is given and needs no limits.
GPTCORE_INLINE Vec exp2(Vec u) {
#if defined(__AVX512F__)
  const Vec f = (Vec)_mm512_reduce_ps((__m512)u, _MM_FROUND_TO_NEG_INF), n = u;
#else
  u = at_most(at_least(u, -150.0f), 128.0f);
  const Vec magic = splat(12582912.0f);  // as in exp(); whole u may give u - 1, hence f = 1
  const Vec n = ((u - 0.5f) + magic) - magic, f = u - n;
#endif
  Vec p = splat(0.0018671300495043397f);
  p = p * f + 0.009017030708491802f;
  p = p * f + 0.05579991266131401f;
  p = p * f + 0.24016444385051727f;
  p = p * f + 0.6931512951850891f;
  p = p * f + 1.0f;
  return scale_by_power(p, n);
}

#if defined(__AVX512F__)
// table[index mod 32], lane by lane; the table is aligned to 64 bytes.
GPTCORE_INLINE Vec lookup32(const float* table, VecI index) {
  return (Vec)_mm512_permutex2var_ps(_mm512_load_ps(table), (__m512i)index, _mm512_load_ps(table + 16));
}
#endif

}  // namespace GPTCORE_ISA_NS
}  // namespace gptcore
