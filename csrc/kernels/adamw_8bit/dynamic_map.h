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
  // By the low 5 bits of the exponent of y: where in the binade the next j begins, and in its own low 5 bits
  // how far the mantissa of q is rotated at the binade's beginning.
  alignas(64) float border[32];
  // By the low 4 bits of that rotation: the mantissa of q is slope y + 8/9.
  alignas(64) float slope[16];
  // By the low 4 bits of the exponent of a code's number f: value = start (with the sign of f) + step f.
  alignas(64) float start[16];
  alignas(64) float step[16];
};

constexpr int32_t kSignedZero = 127;  // the code of 0 among those of both signs
// The number of a code is its place, with its sign; of those of both signs by 2^-7, so that the low bits of no
// exponent are those of 0.
constexpr float kSignedUnit = 1.0f / 128;

static constexpr double power(double base, int exponent) {
  double result = 1;
  for (int i = 0; i < (exponent < 0 ? -exponent : exponent); ++i) result *= base;
  return exponent < 0 ? 1 / result : result;
}

// Value k of decade i (0 .. 6) of n values.
static constexpr double value_of(int i, int n, int k) {
  return power(10, i - 6) * (0.1 + 0.9 * (k + 0.5) / n);
}

// The nearest number whose low 5 bits are these.
static constexpr float with_low_bits(float x, int bits) {
  const int32_t nearest = __builtin_bit_cast(int32_t, x) - bits + 16;
  return __builtin_bit_cast(float, (nearest & ~31) | bits);
}

// By so much 24 bits of mantissa are rotated to the left, for places n .. 2 n - 1 in the lowest byte.
static constexpr int rotation_of(int first, int j) { return 7 + first + j; }

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
    map.border[(127 + e) & 31] = with_low_bits(border, rotation_of(first, here));
  }
  const double unit = first == 1 ? kSignedUnit : 1;
  const int exponent = first == 1 ? 126 - 7 : 127;  // of a code's number where j is 0
  for (int j = 0; j <= 8; ++j) {
    const int index = (exponent + j) & 15;
    const bool decade = j > 0 && j < 8;
    const double ten = power(10, j - 7), n = first * power(2, j - 1);  // where the decade ends, its values
    // One has the lowest mantissa of its binade: 0.112 y + 8/9 is 1.0003 to 1.001 there.
    map.slope[rotation_of(first, j) & 15] = static_cast<float>(decade   ? 1 / (0.9 * ten)
                                                               : j == 8 ? 0.112
                                                                        : 0.0);
    map.start[index] = static_cast<float>(decade ? ten * (0.45 / n - 0.8) : j == 8 ? 1.0 : 0.0);
    map.step[index] = static_cast<float>(decade ? 0.9 * ten / (n * unit) : 0.0);
  }
  return map;
}

static constexpr DynamicMap kSignedMap = make_map(1), kUnsignedMap = make_map(2);

// --- tables -----------------------------------------------------------------------------------------------

// A table of 16 numbers times the scale of a block.
struct Table16 {
#if defined(__AVX512F__)
  Vec values;
#else
  float values[16];
#endif
};
GPTCORE_INLINE Table16 scaled(const float* table, float scale) {
  Table16 t;
#if defined(__AVX512F__)
  t.values = load(table) * scale;
#else
  for (int i = 0; i < 16; ++i) t.values[i] = table[i] * scale;
#endif
  return t;
}
GPTCORE_INLINE Vec look_up(const Table16& table, VecI index) {
#if defined(__AVX512F__)
  return (Vec)_mm512_permutexvar_ps((__m512i)index, (__m512)table.values);
#else
  Vec x;
  for (int lane = 0; lane < kLanes; ++lane) x[lane] = table.values[index[lane] & 15];
  return x;
#endif
}
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

GPTCORE_INLINE VecU rotate_left(VecU x, VecI count) {
#if defined(__AVX512F__)
  return (VecU)_mm512_rolv_epi32((__m512i)x, (__m512i)count);
#else
  count &= 31;
  return (x << (VecU)count) | (x >> (VecU)((32 - count) & 31));
#endif
}

// The 24 bits of x's mantissa.
GPTCORE_INLINE VecU whole_mantissa(Vec x) {
#if defined(__AVX512F__)
  constexpr int and_or = 0xea;
  return (VecU)_mm512_ternarylogic_epi32((__m512i)x, _mm512_set1_epi32(0x7fffff), _mm512_set1_epi32(0x800000),
                                         and_or);
#else
  return ((VecU)x & 0x7fffffu) | 0x800000u;
#endif
}

// The magnitude of y, and no less than `limit`.
GPTCORE_INLINE Vec magnitude_at_least(Vec y, float limit) {
#if defined(__AVX512F__)
  constexpr int larger_without_sign = 0xb;
  return (Vec)_mm512_range_ps((__m512)y, (__m512)splat(limit), larger_without_sign);
#else
  return at_least(abs(y), limit);
#endif
}

// One more where y >= limit. GCC makes two instructions of a difference with a comparison.
GPTCORE_INLINE VecI plus_one_from(VecI x, Vec y, Vec limit) {
#if defined(__AVX512F__)
  const __mmask16 reached = _mm512_cmp_ps_mask((__m512)y, (__m512)limit, _CMP_GE_OQ);
  return (VecI)_mm512_mask_add_epi32((__m512i)x, reached, (__m512i)x, _mm512_set1_epi32(1));
#else
  return x - (y >= limit);
#endif
}

constexpr float kLeastMagnitude = 1.1920929e-7f;  // 2^-23, far below the first value

// Place of the magnitude y, kLeastMagnitude to 1, in the lowest byte of each lane; what lies above wraps around.
GPTCORE_INLINE VecU place_of(Vec y, const DynamicMap& map) {
  const Vec border = table32(map.border, (VecI)y >> 23);
  const VecI rotation = plus_one_from((VecI)border, y, border);
  const Vec mantissa = at_most(y * table16(map.slope, rotation) + 8.0f / 9, 1.9999999f);
  return rotate_left(whole_mantissa(mantissa), rotation);
}

// The map of both signs: codes 0 .. 126 negative, 127 zero, 255 one; in the lowest byte of each lane.
GPTCORE_INLINE VecI signed_code(Vec y) {
  y = at_least(y, -0.99f);  // there is no -1
  const VecU place = place_of(magnitude_at_least(y, kLeastMagnitude), kSignedMap);
  const VecU zero = (VecU)splat_int(kSignedZero);
  return (VecI)((VecI)y < 0 ? zero - place : zero + place);
}

// The map of numbers above zero: codes 0 zero, 255 one; in the lowest byte of each lane.
GPTCORE_INLINE VecI unsigned_code(Vec y) {
  return (VecI)(place_of(at_least(y, kLeastMagnitude), kUnsignedMap) - 1u);
}

// --- values -----------------------------------------------------------------------------------------------

// A map times the scale of a block.
struct ScaledMap {
  Table16 start, step;
};
GPTCORE_INLINE ScaledMap scaled(const DynamicMap& map, float scale) {
  return {scaled(map.start, scale), scaled(map.step, scale)};
}

GPTCORE_INLINE Vec signed_value(VecI code, const ScaledMap& map) {
  const Vec number = __builtin_convertvector(code, Vec) * kSignedUnit - kSignedZero * kSignedUnit;
  const VecI exponent = (VecI)number >> 23, sign = (VecI)number & static_cast<int32_t>(0x80000000u);
  return (Vec)((VecI)look_up(map.start, exponent) ^ sign) + look_up(map.step, exponent) * number;
}
GPTCORE_INLINE Vec unsigned_value(VecI code, const ScaledMap& map) {
  const Vec number = __builtin_convertvector(code, Vec) + 1.0f;
  const VecI exponent = (VecI)number >> 23;
  return look_up(map.start, exponent) + look_up(map.step, exponent) * number;
}

}  // namespace GPTCORE_ISA_NS
}  // namespace gptcore
