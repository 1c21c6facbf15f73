// Philox4x32-10 (core/philox.h) for one thread: the same words on every device.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "core/cuda/integer.cuh"

namespace gptcore::cuda {

struct PhiloxWords {
  uint32_t at[4];
};

// Two for each round. Made on the host they are operands that a loop over counters has no room to keep.
struct PhiloxKeys {
  uint32_t at[20];
};

__host__ __device__ __forceinline__ PhiloxKeys philox_keys(uint64_t seed) {
  PhiloxKeys keys;
  uint32_t first = static_cast<uint32_t>(seed), second = static_cast<uint32_t>(seed >> 32);
  for (int i = 0; i < 20; i += 2) {
    keys.at[i] = first, keys.at[i + 1] = second;
    first += 0x9e3779b9u, second += 0xbb67ae85u;
  }
  return keys;
}

__device__ __forceinline__ PhiloxWords philox(const PhiloxKeys& keys, PhiloxWords counter) {
  uint32_t (&x)[4] = counter.at;
#pragma unroll
  for (int i = 0; i < 20; i += 2) {
    const WideProduct p = multiply_wide(0xd2511f53u, x[0]), q = multiply_wide(0xcd9e8d57u, x[2]);
    x[0] = q.high ^ x[1] ^ keys.at[i], x[2] = p.high ^ x[3] ^ keys.at[i + 1];
    x[1] = q.low, x[3] = p.low;
  }
  return counter;
}
__device__ __forceinline__ PhiloxWords philox(uint64_t seed, PhiloxWords counter) {
  return philox(philox_keys(seed), counter);
}

}  // namespace gptcore::cuda
