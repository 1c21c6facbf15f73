// The choice of experts, a token by 8 lanes or a warp: gates, lse and what a block of tokens adds to the losses.
#pragma once

#include "core/cuda/convert.cuh"
#include "core/cuda/reduce.cuh"
#include "kernels/moe_router/moe_router_device.h"
#include "kernels/moe_router/moe_router_places.cuh"

namespace gptcore::cuda {

__device__ __forceinline__ float load_logit(const void* logits, bool bf16_logits, int64_t at) {
  return bf16_logits ? to_float(static_cast<const bf16*>(logits)[at]) : static_cast<const float*>(logits)[at];
}

struct Choice {
  float logit;
  int expert;
};

// Larger first, of equals the lower expert.
__device__ __forceinline__ Choice better(Choice a, Choice b) {
  return a.logit > b.logit || (a.logit == b.logit && a.expert < b.expert) ? a : b;
}

constexpr int kNoExpert = 0x7fffffff;

// The best that comes after `last` in a row whose NaN are -inf; every lane of the token gets it.
template <int kLanes>
__device__ __forceinline__ Choice next_choice(const float* row, int experts, Choice last) {
  Choice best{-INFINITY, kNoExpert};
  for (int e = lane() % kLanes; e < experts; e += kLanes) {
    const float x = row[e];
    const bool left = x < last.logit || (x == last.logit && e > last.expert);
    if (left && (x > best.logit || best.expert == kNoExpert)) best = {x, e};
  }
#pragma unroll
  for (int step = kLanes / 2; step > 0; step /= 2) {
    best = better(
        best, {__shfl_xor_sync(kFullMask, best.logit, step), __shfl_xor_sync(kFullMask, best.expert, step)});
  }
  return best;
}

// What one token, or a block of them, adds to the losses.
struct TokenSums {
  float z = 0.0f, entropy = 0.0f;
  int tokens = 0;
};

// Reads a token's logits into `row`; whether any is NaN. Each lane reads back only what it wrote.
template <int kLanes>
__device__ __forceinline__ bool load_row(const MoeRouterDeviceForward& a, int64_t token, float* row) {
  bool missing = false;
  for (int e = lane() % kLanes; e < a.experts; e += kLanes) {
    const float x = load_logit(a.logits, a.bf16, token * a.stride + e);
    missing = missing || isnan(x);
    row[e] = isnan(x) ? -INFINITY : x;
  }
  return missing;
}

// The K choices of the token; lane i has those of places i and i + kLanes.
template <int kLanes>
__device__ __forceinline__ void write_choices(const MoeRouterDeviceForward& a, int64_t token, bool valid,
                                              bool alive, const float (&gate)[2], const int (&expert)[2]) {
  const int place = lane() % kLanes;
  const float first = __shfl_sync(kFullMask, gate[0], 0, kLanes),
              second = __shfl_sync(kFullMask, gate[0], 1, kLanes);
#pragma unroll
  for (int slot = 0; slot < 2; ++slot) {
    const int k = place + slot * kLanes;
    if (!alive || k >= a.choices) continue;
    const int64_t at = token * a.choices + k;
    a.gates[at] = valid ? gate[slot] : 0.0f;
    a.chosen[at] = valid ? expert[slot] : -1;
    if (k == 1 && a.uniforms) {  // whether chance keeps it; a NaN gate is not kept
      const double drawn = static_cast<double>(a.uniforms[token]) * a.second_threshold;
      a.rows[at] = drawn < static_cast<double>(second / (first + second)) ? 0 : -1;
    }
  }
}

// All of one token; adds to the sums of its block.
template <int kLanes>
__device__ __forceinline__ void choose_token(const MoeRouterDeviceForward& a, const RouterScratch& s,
                                             int64_t token, bool alive, float* row, float* probabilities,
                                             TokenSums* sums) {
  const int experts = static_cast<int>(a.experts), place = lane() % kLanes;
  const bool missing = load_row<kLanes>(a, alive ? token : 0, row);
  Choice last{INFINITY, -1};
  float top = 0.0f, gate[2] = {-INFINITY, -INFINITY};
  int expert[2] = {-1, -1};
  for (int k = 0; k < a.choices; ++k) {
    last = next_choice<kLanes>(row, experts, last);
    if (k == 0) top = last.logit;
    if (k == place) gate[0] = last.logit, expert[0] = last.expert;
    if (k == place + kLanes) gate[1] = last.logit, expert[1] = last.expert;
  }

  float sum = missing ? NAN : 0.0f, moment = 0.0f;
  for (int e = place; e < experts; e += kLanes) {
    const float distance = row[e] - top, x = expf(distance);
    row[e] = x;
    sum += x;
    moment += x > 0.0f ? x * distance : 0.0f;  // 0 times -inf
  }
  sum = warp_reduce<Add, kLanes>(sum), moment = warp_reduce<Add, kLanes>(moment);
  const bool valid = alive && (!a.mask || a.mask[token]);
  const float inverse = 1.0f / sum, spread = logf(sum), lse = top + spread;
  for (int e = place; valid && e < experts; e += kLanes) probabilities[e] += row[e] * inverse;

#pragma unroll
  for (int slot = 0; slot < 2; ++slot) gate[slot] = expert[slot] >= 0 ? expf(gate[slot] - top) : 0.0f;
  const float chosen = warp_reduce<Add, kLanes>(gate[0] + gate[1]);
  const float divisor = a.renormalise ? chosen + (sum - sum) : sum;  // NaN where any logit is
  gate[0] /= divisor, gate[1] /= divisor;
  write_choices<kLanes>(a, token, valid, alive, gate, expert);
  if (alive && place == 0) {
    a.lse[token] = lse;
    if (a.by_gate) s.top_probability[token] = inverse;
  }
  if (valid) sums->z += lse * lse, sums->entropy += spread - moment * inverse, ++sums->tokens;
}

// A block's tokens, those of one group of lanes after each other; then its sums, the groups' in their order.
template <int kLanes>
__global__ void __launch_bounds__(256) choose_experts(const MoeRouterDeviceForward a, const RouterScratch s) {
  const int groups = static_cast<int>(blockDim.x) / kLanes, group = static_cast<int>(threadIdx.x) / kLanes;
  const int experts = static_cast<int>(a.experts);
  float *rows = shared_memory<float>(), *probabilities = rows + groups * experts;
  float* losses = probabilities + groups * experts;  // z, entropy and tokens of each group
  for (int e = lane() % kLanes; e < experts; e += kLanes) probabilities[group * experts + e] = 0.0f;
  TokenSums sums;
  const int64_t first = blockIdx.x * s.chunk, end = first + s.chunk < a.tokens ? first + s.chunk : a.tokens;
  for (int64_t i = first; i < end; i += groups) {
    const int64_t token = i + group;
    choose_token<kLanes>(a, s, token, token < end, rows + group * experts, probabilities + group * experts,
                         &sums);
  }
  if (lane() % kLanes == 0) {
    losses[group] = sums.z, losses[groups + group] = sums.entropy;
    losses[2 * groups + group] = static_cast<float>(sums.tokens);
  }
  __syncthreads();
  for (int e = static_cast<int>(threadIdx.x); e < experts; e += static_cast<int>(blockDim.x)) {
    float total = 0.0f;
    for (int g = 0; g < groups; ++g) total += probabilities[g * experts + e];
    s.probabilities[blockIdx.x * a.experts + e] = total;
  }
  if (threadIdx.x < 3) {
    float total = 0.0f;
    for (int g = 0; g < groups; ++g) total += losses[threadIdx.x * groups + g];
    s.losses[blockIdx.x * 3 + threadIdx.x] = total;
  }
  if (s.order) return;  // another kernel counts them, in that order
  __syncthreads();
  count_chunk(a, s, shared_memory<int>(), 2 * groups);
}

}  // namespace gptcore::cuda
