// For kernels short of registers.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

namespace gptcore::cuda {

// x, of which the compiler knows nothing more: what follows from it is computed where it is used, every time round a
// loop, where ahead of the loop it would take registers throughout.
__device__ __forceinline__ int in_place(int x) {
  asm volatile("" : "+r"(x));
  return x;
}
__device__ __forceinline__ uint64_t in_place(uint64_t x) {
  uint32_t low = static_cast<uint32_t>(x), high = static_cast<uint32_t>(x >> 32);
  asm volatile("" : "+r"(low), "+r"(high));
  return uint64_t{high} << 32 | low;
}

}  // namespace gptcore::cuda
