// Sums and maxima over a warp and a block, in an order that the shape alone fixes: the same bits in every run.
#pragma once

#include "core/cuda/launch.cuh"

namespace gptcore::cuda {

struct Add {
  __device__ static float join(float a, float b) { return a + b; }
  static constexpr float kNone = 0.0f;
};
struct Max {
  __device__ static float join(float a, float b) { return a > b ? a : b; }
  static constexpr float kNone = -INFINITY;
};

// Over `width` neighbouring lanes, a power of two; every lane gets the result.
template <class Op = Add, int width = kWarp>
__device__ __forceinline__ float warp_reduce(float x) {
#pragma unroll
  for (int step = width / 2; step > 0; step /= 2) x = Op::join(x, __shfl_xor_sync(kFullMask, x, step));
  return x;
}

// Over the block, whose threads all come; `room` is 32 floats of shared memory, free again when the next barrier has
// been passed. Every thread gets the result.
template <class Op = Add>
__device__ __forceinline__ float block_reduce(float x, float* room) {
  const int warps = static_cast<int>(blockDim.x + kWarp - 1) / kWarp;
  x = warp_reduce<Op>(x);
  if (warps == 1) return x;
  if (lane() == 0) room[warp()] = x;
  __syncthreads();
  return warp_reduce<Op>(lane() < warps ? room[lane()] : Op::kNone);
}

}  // namespace gptcore::cuda
