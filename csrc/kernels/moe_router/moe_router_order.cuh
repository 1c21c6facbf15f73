// Tokens by falling priority, of equal ones the earlier first, a NaN last. Tiles of keys are sorted in shared memory;
// a key's place among all is the sum of its places in each tile, found by halving. Keys are distinct, since they end
// in the token's number.
#pragma once

#include "core/cuda/launch.cuh"
#include "kernels/moe_router/moe_router_plan.h"

namespace gptcore::cuda {

using OrderKey = unsigned long long;

// Smaller for what comes earlier.
__device__ __forceinline__ OrderKey order_key(float priority, int64_t token) {
  const float x = isnan(priority) ? -INFINITY : priority + 0.0f;  // -0 as 0
  const unsigned bits = __float_as_uint(x);
  const unsigned rising = bits & 0x80000000u ? ~bits : bits | 0x80000000u;
  return static_cast<OrderKey>(~rising) << 32 | static_cast<unsigned>(token);
}

constexpr int kSortThreads = 256;

// One tile by a block: a bitonic network.
__global__ void __launch_bounds__(kSortThreads)
    sort_tiles(const float* priority, int64_t tokens, int keys, OrderKey* sorted) {
  OrderKey* tile = shared_memory<OrderKey>();
  const int64_t first = static_cast<int64_t>(blockIdx.x) * keys;
  for (int i = static_cast<int>(threadIdx.x); i < keys; i += kSortThreads) {
    tile[i] = first + i < tokens ? order_key(priority[first + i], first + i) : ~OrderKey{0};
  }
  for (int size = 2; size <= keys; size *= 2) {
    for (int step = size / 2; step > 0; step /= 2) {
      __syncthreads();
      for (int i = static_cast<int>(threadIdx.x); i < keys / 2; i += kSortThreads) {
        const int low = 2 * i - (i & (step - 1)), high = low + step;
        const OrderKey a = tile[low], b = tile[high];
        if ((a > b) == ((low & size) == 0)) tile[low] = b, tile[high] = a;
      }
    }
  }
  __syncthreads();
  for (int i = static_cast<int>(threadIdx.x); i < keys; i += kSortThreads) sorted[first + i] = tile[i];
}

__global__ void __launch_bounds__(kSortThreads)
    rank_keys(const OrderKey* sorted, int64_t tokens, int keys, int tiles, int32_t* order) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kSortThreads + threadIdx.x;
  if (i >= static_cast<int64_t>(tiles) * keys) return;
  const OrderKey key = sorted[i];
  if (key == ~OrderKey{0}) return;
  int64_t place = i % keys;
  for (int t = 0; t < tiles; ++t) {
    if (t == i / keys) continue;
    const OrderKey* tile = sorted + static_cast<int64_t>(t) * keys;
    int low = 0;  // so many are known to come before
    for (int step = keys / 2; step > 0; step /= 2) low += tile[low + step - 1] < key ? step : 0;
    place += low + (tile[low] < key ? 1 : 0);
  }
  order[place] = static_cast<int32_t>(key);
}

inline void sort_tokens(const float* priority, int64_t tokens, OrderKey* sorted, int32_t* order) {
  const int keys = static_cast<int>(tile_keys(tokens)), tiles = static_cast<int>((tokens + keys - 1) / keys);
  launch<&sort_tiles>(
      {dim3(static_cast<unsigned>(tiles)), dim3(kSortThreads), keys * int64_t{sizeof(OrderKey)}}, priority,
      tokens, keys, sorted);
  const int64_t all = int64_t{tiles} * keys;
  launch<&rank_keys>(
      {dim3(static_cast<unsigned>((all + kSortThreads - 1) / kSortThreads)), dim3(kSortThreads)},
      static_cast<const OrderKey*>(sorted), tokens, keys, tiles, order);
}

}  // namespace gptcore::cuda
