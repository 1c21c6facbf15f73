// Sums over a row that blockDim.x threads of a block share (a power of two up to 32, or whole warps), and as many
// threads of other blocks of the cluster. Several rows may lie in a block, along blockDim.y.
#pragma once

#include "core/cuda/launch.cuh"

namespace gptcore::cuda {

// Floats of shared memory for kSums sums: a place for each warp and one for the block.
template <int kSums>
constexpr int kRowSumRoom = kSums * (kWarp + 1);

// Every thread of the row comes and gets its sums; rows of one block do not wait for each other. `room` is free again
// when all have passed another call, so that calls take turns with two rooms.
template <int kSums>
__device__ __forceinline__ void row_sums(float (&x)[kSums], int cluster, float* room) {
  const int lanes = static_cast<int>(blockDim.x), warps = lanes / kWarp;
  if (!warps) {
    for (int step = lanes / 2; step > 0; step /= 2) {
#pragma unroll
      for (int i = 0; i < kSums; ++i) x[i] += __shfl_xor_sync(kFullMask, x[i], step);
    }
    return;
  }
#pragma unroll
  for (int step = kWarp / 2; step > 0; step /= 2) {
#pragma unroll
    for (int i = 0; i < kSums; ++i) x[i] += __shfl_xor_sync(kFullMask, x[i], step);
  }
  if (warps == 1) return;
  const int first = static_cast<int>(threadIdx.y) * warps;
  if (lane() == 0) {
#pragma unroll
    for (int i = 0; i < kSums; ++i) room[i * kWarp + first + warp()] = x[i];
  }
  named_barrier(1 + static_cast<int>(threadIdx.y), lanes);
#pragma unroll
  for (int i = 0; i < kSums; ++i) x[i] = room[i * kWarp + first];
#pragma unroll 1
  for (int w = 1; w < warps; ++w) {
#pragma unroll
    for (int i = 0; i < kSums; ++i) x[i] += room[i * kWarp + first + w];
  }
  if (cluster <= 1) return;
  float* own = room + kSums * kWarp;
  if (threadIdx.x == 0) {
#pragma unroll
    for (int i = 0; i < kSums; ++i) own[i] = x[i];
  }
  cluster_sync();
  for (int rank = 0; rank < cluster; ++rank) {
#pragma unroll
    for (int i = 0; i < kSums; ++i) {
      const float part = peer_float(own + i, static_cast<unsigned>(rank));
      x[i] = rank ? x[i] + part : part;
    }
  }
}

}  // namespace gptcore::cuda
