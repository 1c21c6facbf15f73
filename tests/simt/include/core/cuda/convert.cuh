// csrc/core/cuda/convert.cuh for the processor.
#pragma once

#include <cuda_runtime.h>

#include "core/dtype.h"

namespace gptcore::cuda {

inline float to_float(float x) { return x; }
inline float to_float(bf16 x) { return __uint_as_float(uint32_t{x.bits} << 16); }
inline float to_float(f16 x) {
  const uint32_t sign = uint32_t{x.bits & 0x8000u} << 16, rest = x.bits & 0x7fffu;
  float y;
  if (rest >= 0x7c00u) {
    y = __uint_as_float(0x7f800000u | (rest & 0x3ffu) << 13);
  } else if (rest < 0x400u) {
    y = std::ldexp(static_cast<float>(rest), -24);
  } else {
    y = __uint_as_float((rest << 13) + (112u << 23));
  }
  return __uint_as_float(__float_as_uint(y) | sign);
}

template <class T>
inline T from_float(float x);
template <>
inline float from_float<float>(float x) {
  return x;
}
template <>
inline bf16 from_float<bf16>(float x) {
  const uint32_t bits = __float_as_uint(x);
  if (std::isnan(x)) return {0x7fffu};
  return {static_cast<uint16_t>((bits + 0x7fffu + (bits >> 16 & 1u)) >> 16)};
}
template <>
inline f16 from_float<f16>(float x) {
  const auto sign = static_cast<uint16_t>(__float_as_uint(x) >> 16 & 0x8000u);
  const float size = std::fabs(x);
  if (std::isnan(x)) return {0x7fffu};
  if (size >= 65520.0f) return {static_cast<uint16_t>(sign | 0x7c00u)};
  if (size < 0x1p-14f) {  // subnormal: a multiple of 2^-24, rounded to even by the addition
    return {static_cast<uint16_t>(sign | static_cast<uint16_t>(std::nearbyint(std::ldexp(size, 24))))};
  }
  const uint32_t bits = __float_as_uint(size);
  const uint32_t rounded = bits + 0xfffu + (bits >> 13 & 1u);
  return {static_cast<uint16_t>(sign | ((rounded - (112u << 23)) >> 13))};
}

template <class T>
inline uint32_t pack_pair(float low, float high) {
  return uint32_t{from_float<T>(high).bits} << 16 | from_float<T>(low).bits;
}

}  // namespace gptcore::cuda
