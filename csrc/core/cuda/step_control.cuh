// What one update multiplies gradients with, worked out on the device: nobody waits for the norm.
#pragma once

#include "core/cuda/launch.cuh"
#include "core/device_number.h"

namespace gptcore::cuda {

__device__ __forceinline__ double read_number(const DeviceNumber& n) {
  if (!n.at) return n.value;
  if (n.dtype == DType::f32) return static_cast<double>(*static_cast<const float*>(n.at));
  if (n.dtype == DType::i64) return static_cast<double>(*static_cast<const int64_t*>(n.at));
  return *static_cast<const double*>(n.at);
}

// The norm of all gradients over `scale`, to be clipped to max_norm: infinity where there is no clip.
struct GradientRule {
  DeviceNumber scale, norm;
  double max_norm;
  bool maximize;
};

// The gradients' factor as clip_factor (core/optimizer.h) has it. `skip`: an element was not finite, and nothing is
// to be written.
struct GradientFactor {
  double factor;
  bool skip;
};
__device__ __forceinline__ GradientFactor factor_of(const GradientRule& rule) {
  const double norm = read_number(rule.norm), scale = read_number(rule.scale);
  const double clip = rule.max_norm < norm + 1e-6 ? rule.max_norm / (norm + 1e-6) : 1.0;
  return {clip / (rule.maximize ? -scale : scale), !isfinite(norm)};
}

__device__ __forceinline__ void write_result(const DeviceResult& result, double norm) {
  if (result.norm) *result.norm = norm;
  if (result.found_inf) *result.found_inf = !isfinite(norm);
}

// Sums in f64, in an order that the shape alone fixes.
__device__ __forceinline__ double warp_sum(double x) {
#pragma unroll
  for (int step = kWarp / 2; step > 0; step /= 2) x += __shfl_xor_sync(kFullMask, x, step);
  return x;
}
// Over the block, whose threads all come; `room` is 32 doubles of shared memory, free again behind the next barrier.
// Every thread gets the sum.
__device__ __forceinline__ double block_sum(double x, double* room) {
  const int warps = static_cast<int>(blockDim.x) / kWarp;
  x = warp_sum(x);
  if (warps == 1) return x;
  if (lane() == 0) room[warp()] = x;
  __syncthreads();
  return warp_sum(lane() < warps ? room[lane()] : 0.0);
}

// Of four squares in f32; of what leaves its range, in f64. All-zero gradients are common.
__device__ __forceinline__ double square_sum(const float (&x)[4]) {
  const float sum = (x[0] * x[0] + x[1] * x[1]) + (x[2] * x[2] + x[3] * x[3]);
  if (sum > 1e-30f && sum < 1e38f) return static_cast<double>(sum);
  double exact = 0;
#pragma unroll
  for (int i = 0; i < 4; ++i) exact += static_cast<double>(x[i]) * static_cast<double>(x[i]);
  return exact;
}

}  // namespace gptcore::cuda
