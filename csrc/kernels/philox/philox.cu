// Random bits by counter on CUDA: a thread a counter.
#include "core/cuda/philox.cuh"

#include "core/cuda/launch.cuh"
#include "core/cuda/pack.cuh"
#include "kernels/philox/philox_body.h"

namespace gptcore::cuda {
namespace {

constexpr int kThreads = 256;

// `packed`: counters and results may be moved whole. `out` may be `counters`.
__global__ void __launch_bounds__(kThreads)
    philox_counters(uint64_t seed, const uint32_t* counters, int64_t count, uint32_t* out, bool packed) {
  const int64_t n = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  if (n >= count) return;
  counters += 4 * n, out += 4 * n;
  PhiloxWords words;
  if (packed) {
    const uint4 raw = *reinterpret_cast<const uint4*>(counters);
    words = {raw.x, raw.y, raw.z, raw.w};
  } else {
#pragma unroll
    for (int i = 0; i < 4; ++i) words.at[i] = counters[i];
  }
  words = philox(seed, words);
  if (packed) {
    *reinterpret_cast<uint4*>(out) = make_uint4(words.at[0], words.at[1], words.at[2], words.at[3]);
  } else {
#pragma unroll
    for (int i = 0; i < 4; ++i) out[i] = words.at[i];
  }
}

void run(uint64_t seed, const uint32_t* counters, int64_t count, uint32_t* out) {
  const bool packed = can_pack<uint32_t>(counters, 0) && can_pack<uint32_t>(out, 0);
  const auto blocks = static_cast<unsigned>((count + kThreads - 1) / kThreads);
  launch<&philox_counters>({dim3(blocks), dim3(kThreads)}, seed, counters, count, out, packed);
}

}  // namespace

GPTCORE_CUDA_BODIES(PhiloxBodies, philox_bodies) = {run};

}  // namespace gptcore::cuda
