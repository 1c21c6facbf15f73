// Philox4x32-10 (core/philox.h) for one thread: the same words on every device.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "core/cuda/integer.cuh"

namespace gptcore::cuda {

struct PhiloxWords {
  uint32_t at[4];
};

__device__ __forceinline__ PhiloxWords philox(uint64_t seed, PhiloxWords counter) {
  uint32_t first = static_cast<uint32_t>(seed), second = static_cast<uint32_t>(seed >> 32);
  uint32_t (&x)[4] = counter.at;
#pragma unroll
  for (int round = 0; round < 10; ++round) {
    const WideProduct p = multiply_wide(0xd2511f53u, x[0]), q = multiply_wide(0xcd9e8d57u, x[2]);
    x[0] = q.high ^ x[1] ^ first, x[2] = p.high ^ x[3] ^ second;
    x[1] = q.low, x[3] = p.low;
    first += 0x9e3779b9u, second += 0xbb67ae85u;
  }
  return counter;
}

}  // namespace gptcore::cuda
