// The dynamic map of 8 bits (Dettmers 2016; Dettmers et al. 2022, appendix) as a formula. Its values are
// equally spaced within each decade, so that decade and place in it follow from the exponent of a number, and
// no table of 256 is searched or gathered from.
//
// Values are numbered by place q, of magnitudes: decade i has places n_i .. 2 n_i - 1, n_i = first * 2^i. Zero
// has place first - 1 and one has place first * 2^7, as if they were decades -1 and 7: j = i + 1 is 0 .. 8. So
// q + 1/2 as a float has a mantissa of 1 + (k + 1/2) / n_i, which says where value k lies within the decade, and
// an exponent that tells j. The other way, 1 + (place of y within its decade, 0 .. 1) is that mantissa, and q its
// upper bits.
#pragma once

#include "core/simd.h"

namespace gptcore {
namespace GPTCORE_ISA_NS {

struct DynamicMap {
  // By the low 5 bits of the exponent of y: where in the binade the next j begins, and in its low 4 bits, of
  // no weight beside 8 bits, the j at the binade's beginning.
  alignas(64) float border[32];
  // By j: the mantissa of q is slope y + 8/9.
  alignas(64) float slope[16];
  // By the low 4 bits of the exponent of q + 1/2: value = start + step * mantissa.
  alignas(64) float start[16];
  alignas(64) float step[16];
};

static constexpr double power(double base, int exponent) {
  double result = 1;
  for (int i = 0; i < (exponent < 0 ? -exponent : exponent); ++i) result *= base;
  return exponent < 0 ? 1 / result : result;
}

// Value k of decade i (0 .. 6) of n values.
static constexpr double value_of(int i, int n, int k) {
  return power(10, i - 6) * (0.1 + 0.9 * (k + 0.5) / n);
}

static constexpr float with_low_bits(float x, int bits) {
  return __builtin_bit_cast(float, (__builtin_bit_cast(int32_t, x) & ~15) | bits);
}

static constexpr DynamicMap make_map(int first) {
  DynamicMap map = {};
  double begins[10] = {};  // where each j does: half way from the last value below to its first
  for (int j = 1; j <= 8; ++j) {
    const int n = first << (j - 1);
    const double below = j == 1 ? 0 : value_of(j - 2, n / 2, n / 2 - 1);
    begins[j] = (below + (j == 8 ? 1 : value_of(j - 1, n, 0))) / 2;
  }
  for (int e = -23; e <= 0; ++e) {
    int here = 0;
    float border = 2;  // none: no y is as large
    for (int j = 1; j <= 8; ++j) {
      if (begins[j] <= power(2, e)) here = j;
      if (begins[j] > power(2, e) && begins[j] <= power(2, e + 1)) border = static_cast<float>(begins[j]);
    }
    map.border[(127 + e) & 31] = with_low_bits(border, here);
  }
  const int exponent = first == 1 ? 126 : 127;  // of q + 1/2 where j is 0
  for (int j = 0; j <= 8; ++j) {
    const int index = (exponent + j) & 15;
    const bool decade = j > 0 && j < 8;
    const double ten = power(10, j - 7);  // where the decade ends
    // One has the lowest mantissa of its binade: 0.112 y + 8/9 is 1.0003 to 1.001 there.
    map.slope[j] = static_cast<float>(decade ? 1 / (0.9 * ten) : j == 8 ? 0.112 : 0.0);
    map.start[index] = static_cast<float>(decade ? -0.8 * ten : j == 8 ? 1.0 : 0.0);
    map.step[index] = static_cast<float>(decade ? 0.9 * ten : 0.0);
  }
  return map;
}

constexpr int32_t kSignedZero = 127;  // the code of 0 among those of both signs
static constexpr DynamicMap kSignedMap = make_map(1), kUnsignedMap = make_map(2);

// --- tables -----------------------------------------------------------------------------------------------

GPTCORE_INLINE Vec table16(const float* table, VecI index) {
#if defined(__AVX512F__)
  return (Vec)_mm512_permutexvar_ps((__m512i)index, _mm512_load_ps(table));
#else
  Vec x;
  for (int lane = 0; lane < kLanes; ++lane) x[lane] = table[index[lane] & 15];
  return x;
#endif
}
GPTCORE_INLINE Vec table32(const float* table, VecI index) {
#if defined(__AVX512F__)
  return lookup32(table, index);
#else
  Vec x;
  for (int lane = 0; lane < kLanes; ++lane) x[lane] = table[index[lane] & 31];
  return x;
#endif
}
// --- bytes ------------------------------------------------------------------------------------------------

typedef uint8_t VecB __attribute__((vector_size(kLanes)));

GPTCORE_INLINE VecI load_bytes(const uint8_t* p, int64_t n) {
#if defined(__AVX512F__)
  return (VecI)_mm512_cvtepu8_epi32(_mm_maskz_loadu_epi8(static_cast<__mmask16>((1u << n) - 1u), p));
#else
  VecB x = {};
  __builtin_memcpy(&x, p, static_cast<size_t>(n));
  return __builtin_convertvector(x, VecI);
#endif
}
GPTCORE_INLINE void store_bytes(uint8_t* p, VecI x, int64_t n) {
#if defined(__AVX512F__)
  if (n == kLanes) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm512_cvtepi32_epi8((__m512i)x));
    return;
  }
  _mm512_mask_cvtepi32_storeu_epi8(p, static_cast<__mmask16>((1u << n) - 1u), (__m512i)x);
#else
  const VecB bytes = __builtin_convertvector(x, VecB);
  __builtin_memcpy(p, &bytes, static_cast<size_t>(n));
#endif
}

// --- codes ------------------------------------------------------------------------------------------------

// Place of the magnitude y, 0 .. 1. `first` is 1 or 2.
template <int first>
GPTCORE_INLINE VecI place_of(Vec y, const DynamicMap& map) {
  const VecI exponent = (VecI)at_least(y, 1.1920929e-7f) >> 23;  // 2^-23, far below the first value
  const Vec border = table32(map.border, exponent);
  const VecI j = ((VecI)border & 15) - (y >= border);  // -1 where true
  const Vec mantissa = at_most(y * table16(map.slope, j) + 8.0f / 9, 1.9999999f);
  return (((VecI)mantissa & 0x7fffff) | 0x800000) >> (25 - first - j);
}

GPTCORE_INLINE Vec value_at(Vec place_and_half, const DynamicMap& map) {
  const VecI bits = (VecI)place_and_half, exponent = bits >> 23;
  const Vec mantissa = (Vec)((bits & 0x7fffff) | 0x3f800000);
  return table16(map.start, exponent) + table16(map.step, exponent) * mantissa;
}

// The map of both signs: codes 0 .. 126 negative, 127 zero, 255 one.
GPTCORE_INLINE VecI signed_code(Vec y) {
  const VecI place = place_of<1>(abs(y), kSignedMap);
  const VecI code = (VecI)y < 0 ? kSignedZero - place : kSignedZero + place;
  return code > 0 ? code : VecI{};  // there is no -1
}
GPTCORE_INLINE Vec signed_value(VecI code) {
  const VecI centred = code - kSignedZero;
  const VecI sign = centred & static_cast<int32_t>(0x80000000u);
  const VecI place = centred < 0 ? -centred : centred;
  return (Vec)((VecI)value_at(__builtin_convertvector(place, Vec) + 0.5f, kSignedMap) | sign);
}

// The map of numbers above zero: codes 0 zero, 255 one.
GPTCORE_INLINE VecI unsigned_code(Vec y) { return place_of<2>(y, kUnsignedMap) - 1; }
GPTCORE_INLINE Vec unsigned_value(VecI code) {
  return value_at(__builtin_convertvector(code, Vec) + 1.5f, kUnsignedMap);
}

}  // namespace GPTCORE_ISA_NS
}  // namespace gptcore
