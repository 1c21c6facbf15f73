// How tiles lie in shared memory so that neither rows nor columns of 16-byte chunks meet bank conflicts.
#pragma once

#include <cuda_runtime.h>

namespace gptcore::cuda {

// Where 16-byte chunk `chunk` of row `row` lies, in bytes from the tile's start (a multiple of 1,024): rows of
// kRowBytes, an even number of chunks, whose chunks are permuted so that eight rows' chunks of one column, or eight
// chunks of one row, lie in different banks. With rows of 128 bytes it is the copy engine's 128-byte swizzle.
template <int kRowBytes>
__host__ __device__ __forceinline__ constexpr int swizzled(int row, int chunk) {
  static_assert(kRowBytes % 32 == 0);
  constexpr int kChunks = kRowBytes / 16;
  if constexpr (kChunks % 8 == 0) {
    chunk ^= row & 7;
  } else if constexpr (kChunks % 4 == 0) {
    chunk ^= row >> 1 & 3;
  } else {
    chunk ^= row >> 2 & 1;
  }
  return row * kRowBytes + chunk * 16;
}

}  // namespace gptcore::cuda
