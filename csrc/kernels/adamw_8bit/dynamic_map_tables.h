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

#include <cstdint>

namespace gptcore {

// Static: bodies of every instruction set compile their own.
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

constexpr DynamicMap kSignedMap = make_map(1), kUnsignedMap = make_map(2);

constexpr float kLeastMagnitude = 1.1920929e-7f;  // 2^-23, far below the first value

// --- updates -----------------------------------------------------------------------------------------------

// What v is held below.
constexpr float kLargestMoment = 3.4e38f;
// Smaller scales have no inverse in f32; larger ones of m have no step in it, 1.8 times as large.
constexpr float kLeastScale = 1e-37f, kLargestScale = 1.8e38f;

}  // namespace gptcore
