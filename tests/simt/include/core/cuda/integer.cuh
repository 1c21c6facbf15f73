// csrc/core/cuda/integer.cuh for the processor.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

namespace gptcore::cuda {

struct WideProduct {
  uint32_t low, high;
};

inline WideProduct multiply_wide(uint32_t a, uint32_t b) {
  const uint64_t p = uint64_t{a} * b;
  return {static_cast<uint32_t>(p), static_cast<uint32_t>(p >> 32)};
}

inline uint32_t rotate_left(uint32_t x, uint32_t count) {
  return x << (count & 31) | x >> ((0u - count) & 31);
}

inline uint32_t upper_halves(uint32_t first, uint32_t second) { return first >> 16 | (second & 0xffff0000u); }

inline uint32_t odd_byte_signs(uint32_t first, uint32_t second) {
  const uint32_t bits =
      (first >> 15 & 1) | (first >> 31) << 8 | (second >> 15 & 1) << 16 | (second >> 31) << 24;
  return bits * 255;
}

inline uint32_t warp_largest(uint32_t x) {
  for (int step = 16; step > 0; step /= 2) {
    const uint32_t other = __shfl_xor_sync(0xffffffffu, x, step);
    x = other > x ? other : x;
  }
  return x;
}

}  // namespace gptcore::cuda
