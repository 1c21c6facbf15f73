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

}  // namespace gptcore::cuda
