// Rows of a tensor to swizzled tiles in shared memory and back, zeros behind the head size and the last row.
#pragma once

#include "core/cuda/in_place.cuh"
#include "core/cuda/launch.cuh"
#include "core/cuda/mma.cuh"
#include "core/cuda/pack.cuh"
#include "kernels/attention/attention_body.h"

namespace gptcore::cuda {

// Whether a tensor's rows may be copied 16 bytes at a time.
inline bool has_aligned_rows(const AttentionTensor& t, int64_t element_bytes) {
  const uint64_t all = reinterpret_cast<uintptr_t>(t.data) | static_cast<uint64_t>(t.batch * element_bytes) |
                       static_cast<uint64_t>(t.token * element_bytes) |
                       static_cast<uint64_t>(t.head * element_bytes);
  return (all & 15) == 0;
}

// Rows of head_dim elements, `count` of kRows of which exist, to a tile; row_at(row) is where one lies, and `any` what
// may be pointed to. Asynchronous where `aligned`; else done when it returns, all the same in order behind a barrier.
template <class T, int kRowBytes, int kRows, int kThreads, class RowAt>
__device__ __forceinline__ void copy_rows(unsigned char* tile, const RowAt& row_at, const T* any, int count,
                                          int head_dim, bool aligned) {
  constexpr int kChunks = kRowBytes / 16, kPer = kPackElements<T>;
  static_assert(kRows * kChunks % kThreads == 0);
  const int thread = in_place(static_cast<int>(threadIdx.x));
  if (aligned) {
#pragma unroll(kRowBytes > 512 ? 2 : 4)
    for (int i = 0; i < kRows * kChunks / kThreads; ++i) {
      const int at = i * kThreads + thread, row = at / kChunks, chunk = at % kChunks;
      const int left = row < count ? min(max(head_dim - chunk * kPer, 0), kPer) : 0;
      copy_async(tile + swizzled<kRowBytes>(row, chunk), left > 0 ? row_at(row) + chunk * kPer : any,
                 left * static_cast<int>(sizeof(T)));
    }
    return;
  }
#pragma unroll 1
  for (int i = 0; i < kRows * kChunks / kThreads; ++i) {
    const int at = i * kThreads + thread, row = at / kChunks, chunk = at % kChunks;
    Pack<T> pack{};
    if (row < count) {
      const T* from = row_at(row) + chunk * kPer;
#pragma unroll
      for (int j = 0; j < kPer; ++j) {
        if (chunk * kPer + j < head_dim) pack.at[j] = from[j];
      }
    }
    *reinterpret_cast<Pack<T>*>(tile + swizzled<kRowBytes>(row, chunk)) = pack;
  }
}

// The same of rows `stride` elements apart.
template <class T, int kRowBytes, int kRows, int kThreads>
__device__ __forceinline__ void copy_tile(unsigned char* tile, const T* rows, int64_t stride, int count,
                                          int head_dim, bool aligned) {
  copy_rows<T, kRowBytes, kRows, kThreads>(
      tile, [&](int row) { return rows + row * stride; }, rows, count, head_dim, aligned);
}

// A warp's kRows rows of a tile from `first` on to memory, as far as they exist.
template <class T, int kRowBytes, int kRows>
__device__ __forceinline__ void store_rows(const unsigned char* tile, int first, T* rows, int64_t stride,
                                           int count, int head_dim, bool aligned) {
  constexpr int kChunks = kRowBytes / 16, kPer = kPackElements<T>;
#pragma unroll 1
  for (int at = lane(); at < kRows * kChunks; at += kWarp) {
    const int row = first + at / kChunks, chunk = at % kChunks, left = head_dim - chunk * kPer;
    if (row >= count || left <= 0) continue;
    const Pack<T> pack = *reinterpret_cast<const Pack<T>*>(tile + swizzled<kRowBytes>(row, chunk));
    T* to = rows + row * stride + chunk * kPer;
    if (aligned && left >= kPer) {
      *reinterpret_cast<Pack<T>*>(to) = pack;
    } else {
#pragma unroll
      for (int j = 0; j < kPer; ++j) {
        if (j < left) to[j] = pack.at[j];
      }
    }
  }
}

}  // namespace gptcore::cuda
