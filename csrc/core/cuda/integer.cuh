// Integer instructions that the compiler does not find by itself.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

namespace gptcore::cuda {

struct WideProduct {
  uint32_t low, high;
};

// Both halves of a product by one instruction, which a high and a low product are two of.
__device__ __forceinline__ WideProduct multiply_wide(uint32_t a, uint32_t b) {
  WideProduct p;
  asm("{\n.reg .u64 w;\nmul.wide.u32 w, %2, %3;\nmov.b64 {%0, %1}, w;\n}"
      : "=r"(p.low), "=r"(p.high)
      : "r"(a), "r"(b));
  return p;
}

// By the low five bits of `count`, in one instruction.
__device__ __forceinline__ uint32_t rotate_left(uint32_t x, uint32_t count) {
  return __funnelshift_l(x, x, count);
}

// The upper halves of two words, those of the first below.
__device__ __forceinline__ uint32_t upper_halves(uint32_t first, uint32_t second) {
  return __byte_perm(first, second, 0x7632);
}

// A byte of 255 for each odd byte of two words, those of the first below, whose highest bit is set; else 0.
__device__ __forceinline__ uint32_t odd_byte_signs(uint32_t first, uint32_t second) {
  uint32_t signs;
  asm("prmt.b32 %0, %1, %2, 0xfdb9;" : "=r"(signs) : "r"(first), "r"(second));
  return signs;
}

// The largest of a warp's words, which all lanes get: one instruction where five shuffles are ten. Floats of 0 or more
// have the order of their words.
__device__ __forceinline__ uint32_t warp_largest(uint32_t x) { return __reduce_max_sync(0xffffffffu, x); }

}  // namespace gptcore::cuda
