// The gradient of the logits, a token by 8 lanes or a warp, in one pass over them.
#pragma once

#include "kernels/moe_router/moe_router_choose.cuh"

namespace gptcore::cuda {

constexpr int kCountTokensThreads = 256;
constexpr int64_t kCountTokensBlocks = 64;

// How many tokens count, in parts: the losses are means over them.
__global__ void __launch_bounds__(kCountTokensThreads)
    count_tokens(const MoeRouterDeviceBackward a, int* parts) {
  int* room = shared_memory<int>();
  int count = 0;
  for (int64_t n = static_cast<int64_t>(blockIdx.x) * kCountTokensThreads + threadIdx.x; n < a.tokens;
       n += static_cast<int64_t>(gridDim.x) * kCountTokensThreads) {
    count += a.chosen[n * a.choices] >= 0;
  }
  for (int step = kWarp / 2; step > 0; step /= 2) count += __shfl_xor_sync(kFullMask, count, step);
  if (lane() == 0) room[warp()] = count;
  __syncthreads();
  if (threadIdx.x > 0) return;
  for (int w = 1; w < kCountTokensThreads / kWarp; ++w) count += room[w];
  parts[blockIdx.x] = count;
}

// What the losses' gradients come to: of a probability, for each unit of the expert's share, and of lse for each of lse.
struct LossFactors {
  double balance = 0.0;
  float z = 0.0f;
};

__device__ __forceinline__ LossFactors loss_factors(const MoeRouterDeviceBackward& a, const int* parts,
                                                    int count) {
  LossFactors factors;
  if (!parts) return factors;
  int tokens = 0;
  for (int i = lane(); i < count; i += kWarp) tokens += parts[i];
  for (int step = kWarp / 2; step > 0; step /= 2) tokens += __shfl_xor_sync(kFullMask, tokens, step);
  const double n = tokens > 0 ? tokens : 1;
  if (a.dbalance_loss)
    factors.balance = static_cast<double>(*a.dbalance_loss) * static_cast<double>(a.experts) / n;
  if (a.dz_loss) factors.z = static_cast<float>(2.0 * static_cast<double>(*a.dz_loss) / n);
  return factors;
}

// What the gates add to the gradient of the chosen logits: lane i has those of places i and i + kLanes. Returns what they
// take from every logit for each unit of its probability (see moe_router_cpu.cpp).
template <int kLanes>
__device__ __forceinline__ float gate_gradients(const MoeRouterDeviceBackward& a, int64_t token,
                                                const float* row, float (&share)[2], int (&expert)[2]) {
  float gradient[2], sum = 0.0f, dot = 0.0f;
#pragma unroll
  for (int slot = 0; slot < 2; ++slot) {
    const int k = lane() % kLanes + slot * kLanes;
    const int64_t at = token * a.choices + k;
    expert[slot] = k < a.choices ? a.chosen[at] : -1;
    if (expert[slot] >= a.experts) expert[slot] = -1;
    share[slot] = expert[slot] >= 0 ? row[expert[slot]] : 0.0f;
    gradient[slot] = expert[slot] >= 0 && a.rows[at] >= 0 ? a.dgates[at] : 0.0f;
    sum += share[slot], dot += share[slot] * gradient[slot];
  }
  sum = warp_reduce<Add, kLanes>(sum), dot = warp_reduce<Add, kLanes>(dot);
  const float scale = a.renormalise ? 1.0f / sum : 1.0f, mean = a.renormalise ? dot * scale : 0.0f;
#pragma unroll
  for (int slot = 0; slot < 2; ++slot) share[slot] = share[slot] * scale * (gradient[slot] - mean);
  return a.renormalise ? 0.0f : dot;
}

__device__ __forceinline__ void store_logit(void* logits, bool bf16_logits, int64_t at, float x) {
  if (bf16_logits) {
    static_cast<bf16*>(logits)[at] = from_float<bf16>(x);
  } else {
    static_cast<float*>(logits)[at] = x;
  }
}

template <int kLanes>
__global__ void __launch_bounds__(256)
    route_backward(const MoeRouterDeviceBackward a, const int* parts, int count) {
  const int groups = static_cast<int>(blockDim.x) / kLanes, group = static_cast<int>(threadIdx.x) / kLanes;
  const int experts = static_cast<int>(a.experts), place = lane() % kLanes;
  const LossFactors factors = loss_factors(a, parts, count);
  const int64_t wanted = static_cast<int64_t>(blockIdx.x) * groups + group;
  const bool alive = wanted < a.tokens;
  const int64_t token = alive ? wanted : 0;
  float* row = shared_memory<float>() + group * experts;
  const auto balance = [&](int e) {
    return parts ? static_cast<float>(factors.balance * static_cast<double>(a.share[e])) : 0.0f;
  };
  const float lse = a.lse[token];
  float dot = 0.0f;
  for (int e = place; e < experts; e += kLanes) {
    const float p = expf(load_logit(a.logits, a.bf16, token * a.stride + e) - lse);
    row[e] = p;
    dot += p * balance(e);
  }
  dot = warp_reduce<Add, kLanes>(dot);
  __syncwarp();
  float share[2] = {0.0f, 0.0f};
  int expert[2] = {-1, -1};
  if (a.dgates) dot += gate_gradients<kLanes>(a, token, row, share, expert);
  __syncwarp();
  const bool valid = a.chosen[token * a.choices] >= 0;
  const float all = lse * factors.z - dot;
  for (int e = place; e < experts; e += kLanes) row[e] = valid ? row[e] * (all + balance(e)) : 0.0f;
  __syncwarp();
#pragma unroll
  for (int slot = 0; slot < 2; ++slot) {
    if (expert[slot] >= 0) row[expert[slot]] += share[slot];  // each expert once
  }
  __syncwarp();
  for (int e = place; alive && e < experts; e += kLanes) {
    store_logit(a.dlogits, a.bf16, token * a.out_stride + e, row[e]);
  }
}

}  // namespace gptcore::cuda
