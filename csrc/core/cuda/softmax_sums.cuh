// What a softmax needs of a row in one pass: maximum and sum of exponentials, and for the entropy their weighted sum.
#pragma once

#include <cmath>
#include <cstdint>

#include "core/cuda/launch.cuh"

namespace gptcore::cuda {
namespace {

// exp sums relative to the largest logit so far, and for the entropy the same of (l - max) exp(l - max).
struct SoftmaxSums {
  float max = -INFINITY, sum = 0.0f, weighted = 0.0f;
  int64_t place = INT64_MAX;  // the first class of the largest logit

  __device__ void rescale(float to) {
    if (max == to || sum == 0.0f) {
      max = to;
      return;
    }
    const float factor = expf(max - to);
    weighted = factor * (weighted + sum * (max - to));
    sum *= factor;
    max = to;
  }
  __device__ void add(float l) {
    if (l == -INFINITY) return;
    const float d = l - max, e = expf(d);
    sum += e;
    weighted += d == 0.0f ? 0.0f : d * e;
  }
  __device__ void join(const SoftmaxSums& other) {
    const bool no_number = max != max || other.max != other.max;
    if (other.place < place && !(other.max < max)) place = other.place;
    if (other.max > max) place = other.place;
    const float to = fmaxf(max, other.max);
    SoftmaxSums scaled = other;
    scaled.rescale(to);
    rescale(to);
    sum += scaled.sum, weighted += scaled.weighted;
    if (no_number) sum = NAN;
  }
};

__device__ __forceinline__ SoftmaxSums from_lane(const SoftmaxSums& s, int step) {
  SoftmaxSums other;
  other.max = __shfl_xor_sync(kFullMask, s.max, step);
  other.sum = __shfl_xor_sync(kFullMask, s.sum, step);
  other.weighted = __shfl_xor_sync(kFullMask, s.weighted, step);
  other.place = __shfl_xor_sync(kFullMask, s.place, step);
  return other;
}

// The block's sums, in every thread. Lower lanes' and warps' come first, so that all agree to the bit.
__device__ __forceinline__ SoftmaxSums block_sums(SoftmaxSums s, SoftmaxSums* room) {
  for (int step = 1; step < kWarp; step *= 2) {
    SoftmaxSums other = from_lane(s, step);
    if (lane() & step) {
      other.join(s);
      s = other;
    } else {
      s.join(other);
    }
  }
  const int warps = static_cast<int>(blockDim.x) / kWarp;
  if (lane() == 0) room[warp()] = s;
  __syncthreads();
  s = room[0];
  for (int w = 1; w < warps; ++w) s.join(room[w]);
  __syncthreads();
  return s;
}

}  // namespace
}  // namespace gptcore::cuda
