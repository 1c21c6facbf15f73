// The products of a consumer of attention_backward_sm90.cuh: what of a block's tiles they read, and how they begin.
#pragma once

#include "core/cuda/convert.cuh"
#include "core/cuda/wgmma.cuh"
#include "kernels/attention/attention_backward_sm90_schedule.h"

namespace gptcore::cuda::backward_sm90 {

// What a consumer's products read, as wgmma describes it: its rows of K or V,
template <int D>
__device__ __forceinline__ uint64_t rows_operand(const void* tile, int consumer) {
  return k_major_operand<128>(tile) + static_cast<uint64_t>(consumer) * k_major_rows<128>(64);
}
// and, for dQ, its queries of dS' (D 64) or all of them, and K's columns, all or its own (D 128).
template <int D>
__device__ __forceinline__ uint64_t gradients_operand(const void* tile, int consumer) {
  constexpr int kKeys = TileShape<D>::kKeys;
  return mn_major_operand<128, kKeys>(tile) +
         (D == 64 ? static_cast<uint64_t>(consumer) * mn_major_rows<128, kKeys>(64) : 0);
}
template <int D>
__device__ __forceinline__ uint64_t columns_operand(const void* tile, int consumer) {
  constexpr int kKeys = TileShape<D>::kKeys;
  return mn_major_operand<128, kKeys>(tile) +
         (D == 128 ? static_cast<uint64_t>(consumer) * mn_major_rows<128, kKeys>(64) : 0);
}

// d = the consumer's 64 rows at `a` times the tile of queries, transposed.
template <class T, int D>
__device__ __forceinline__ void multiply_rows(float (&d)[TileShape<D>::kQueries / 2], uint64_t a,
                                              const void* queries) {
  using Tiles = TileShape<D>;
  const uint64_t b = k_major_operand<128>(queries);
  wgmma_fence(d);
#pragma unroll
  for (int i = 0; i < D / 16; ++i) {
    wgmma<Tiles::kQueries, T, Major::k, Major::k>(d, a + k_major_step<128, Tiles::kKeys>(i),
                                                  b + k_major_step<128, Tiles::kQueries>(i), i > 0);
  }
  wgmma_commit();
}

// The operands of products that are done, or about to begin.
template <int kCount>
__device__ __forceinline__ void pin_all(uint32_t (&a)[kCount][4]) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) pin(a[i]);
}

// d += a (keys by queries) times the tile of queries.
template <class T, int D>
__device__ __forceinline__ void add_products(float (&d)[D / 2], uint32_t (&a)[TileShape<D>::kQueries / 16][4],
                                             const void* queries) {
  using Tiles = TileShape<D>;
  const uint64_t b = mn_major_operand<128, Tiles::kQueries>(queries);
  pin_all(a);
  wgmma_fence(d);
#pragma unroll
  for (int i = 0; i < Tiles::kQueries / 16; ++i)
    wgmma<D, T, Major::mn>(d, a[i], b + mn_major_step<128>(i), true);
  wgmma_commit();
}

// The operand of dK, transposed, to shared memory as that of dQ: a row of 64 queries a key, swizzled.
template <int kQueries>
__device__ __forceinline__ void store_gradients(const uint32_t (&ds)[kQueries / 16][4], unsigned char* tile,
                                                int consumer) {
  const int group = lane() / 4, row = consumer * 64 + static_cast<int>(threadIdx.x) / kWarp % 4 * 16 + group;
  const int mine = row * 128 + (group << 4) + lane() % 4 * 4;
#pragma unroll
  for (int j = 0; j < kQueries / 8; ++j) {
    unsigned char* at = tile + j / 8 * (TileShape<64>::kKeys * 128) + (mine ^ j % 8 << 4);
    *reinterpret_cast<uint32_t*>(at) = ds[j / 2][j % 2 * 2];
    *reinterpret_cast<uint32_t*>(at + 8 * 128) = ds[j / 2][j % 2 * 2 + 1];
  }
}

// dq = the consumer's 64 x 64 at these operands, of all keys.
template <class T, int D>
__device__ __forceinline__ void multiply_gradients(float (&dq)[32], uint64_t ds, uint64_t k) {
  wgmma_fence(dq);
#pragma unroll
  for (int i = 0; i < TileShape<D>::kKeys / 16; ++i) {
    wgmma<64, T, Major::mn, Major::mn>(dq, ds + mn_major_step<128>(i), k + mn_major_step<128>(i), i > 0);
  }
  wgmma_commit();
}

}  // namespace gptcore::cuda::backward_sm90
