// Philox4x32-10 (core/philox.h) for one thread: the same words on every device.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

namespace gptcore::cuda {

struct PhiloxWords {
  uint32_t at[4];
};

__device__ __forceinline__ PhiloxWords philox(uint64_t seed, PhiloxWords counter) {
  uint32_t first = static_cast<uint32_t>(seed), second = static_cast<uint32_t>(seed >> 32);
  uint32_t (&x)[4] = counter.at;
#pragma unroll
  for (int round = 0; round < 10; ++round) {
    const uint32_t p_high = __umulhi(0xd2511f53u, x[0]), p_low = 0xd2511f53u * x[0];
    const uint32_t q_high = __umulhi(0xcd9e8d57u, x[2]), q_low = 0xcd9e8d57u * x[2];
    x[0] = q_high ^ x[1] ^ first, x[2] = p_high ^ x[3] ^ second;
    x[1] = q_low, x[3] = p_low;
    first += 0x9e3779b9u, second += 0xbb67ae85u;
  }
  return counter;
}

}  // namespace gptcore::cuda
