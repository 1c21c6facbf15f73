// What a softmax needs of a row in one pass: maximum and sum of exponentials, and for the entropy their weighted sum.
#pragma once

#include <cmath>
#include <cstdint>

#include "core/cuda/approximate.cuh"
#include "core/cuda/reduce.cuh"

namespace gptcore::cuda {
namespace {

// Of a difference to a maximum, so that the argument's rounding is small where the result is not.
__device__ __forceinline__ float exp_approximate(float x) { return exp2_approximate(x * 1.44269504f); }

// exp sums relative to the largest logit so far, and for the entropy the same of (l - max) exp(l - max). What is not a
// number makes the sums so, the maximum leaves it out.
struct SoftmaxSums {
  float max = -INFINITY, sum = 0.0f, weighted = 0.0f;
  int64_t place = INT64_MAX;  // where the largest logit was found first

  // What logits are taken relative to: as long as all are -inf, 0.
  __device__ __forceinline__ float base() const { return max == -INFINITY ? 0.0f : max; }
  // Exponentials of less are 0: -inf has no product with them.
  __device__ static __forceinline__ float bounded(float d) { return fmaxf(d, -200.0f); }

  template <bool entropy>
  __device__ __forceinline__ void rescale(float to) {
    const float before = max;
    max = to;
    const float d = before - base(), factor = exp_approximate(d);
    if constexpr (entropy) weighted = factor * (weighted + sum * bounded(d));
    sum = __fmul_rn(
        sum, factor);  // never joined with what is added next: lse has its bits with statistics and without
  }
};

// `statistics`: with what entropy and place need.
template <bool statistics>
__device__ __forceinline__ SoftmaxSums warp_sums(SoftmaxSums s) {
  const float to = warp_reduce<Max>(s.max);
  if constexpr (statistics) {
    if (s.max != to) s.place = INT64_MAX;
    for (int step = 1; step < kWarp; step *= 2) {
      const int64_t other = __shfl_xor_sync(kFullMask, s.place, step);
      if (other < s.place) s.place = other;
    }
  }
  s.rescale<statistics>(to);
  s.sum = warp_reduce(s.sum);
  if constexpr (statistics) s.weighted = warp_reduce(s.weighted);
  return s;
}

// The block's sums, in every thread; all agree to the bit. `room` has a place for each warp.
template <bool statistics>
__device__ __forceinline__ SoftmaxSums block_sums(SoftmaxSums s, SoftmaxSums* room) {
  s = warp_sums<statistics>(s);
  const int warps = static_cast<int>(blockDim.x) / kWarp;
  if (warps == 1) return s;
  if (lane() == 0) room[warp()] = s;
  __syncthreads();
  return warp_sums<statistics>(lane() < warps ? room[lane()] : SoftmaxSums{});
}

}  // namespace
}  // namespace gptcore::cuda
