// The dynamic map of 8 bits (dynamic_map_tables.h) for vectors of numbers.
#pragma once

#include "core/simd.h"
#include "kernels/adamw_8bit/dynamic_map_tables.h"

namespace gptcore {
namespace GPTCORE_ISA_NS {

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
