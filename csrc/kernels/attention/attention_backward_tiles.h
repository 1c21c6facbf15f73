// How attention's backward pass cuts its work on CUDA, and what shared memory that takes: arithmetic alone, for kernels,
// launchers and tests.
//
// A block of eight warps holds a tile of keys and their values, and passes over the tiles of queries that see any of
// them. The scores of a pair of tiles are split over the warps as 2 x 4 (queries by keys), sums of dk and dv as
// key_warps x (8 / key_warps) (keys by head size), those of dq as 2 x 4 (queries by head size).
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

namespace gptcore::cuda {

constexpr int kBackwardThreads = 256;

struct BackwardTiles {
  int element;        // bytes
  int head;           // head size that the kernel is compiled for; what is missing is zeros
  int queries, keys;  // in a tile
  int key_warps;

  // Elements from row to row in shared memory: 16 bytes more than a row has, an odd number of 16-byte chunks, so that
  // the eight rows of a matrix instruction lie in different banks at offsets that the compiler knows.
  __host__ __device__ constexpr int head_pitch() const { return head + 16 / element; }
  __host__ __device__ constexpr int score_pitch() const { return keys + 16 / element; }

  __host__ __device__ constexpr int64_t key_bytes() const {
    return int64_t{keys} * head_pitch() * element;
  }  // of k, and of v
  __host__ __device__ constexpr int64_t query_bytes() const {
    return int64_t{queries} * head_pitch() * element;
  }  // q, dout
  __host__ __device__ constexpr int64_t score_bytes() const {
    return int64_t{queries} * score_pitch() * element;
  }  // P, dS
  __host__ __device__ constexpr int64_t row_bytes() const { return int64_t{queries} * 4; }  // lse, delta
  // Beside them what all of the block know: read now and then, it shall not take registers.
  static constexpr int64_t kPlanBytes = 128;
  // One stage: q, dout and their rows' constants.
  __host__ __device__ constexpr int64_t stage_bytes() const { return 2 * (query_bytes() + row_bytes()); }
  __host__ __device__ constexpr int64_t shared_bytes(int stages) const {
    return kPlanBytes + 2 * key_bytes() + 2 * score_bytes() + stages * stage_bytes();
  }
  // Two stages, so that queries arrive while those before them are worked on, where a block's memory allows.
  __host__ __device__ constexpr int stages(int64_t limit) const { return shared_bytes(2) <= limit ? 2 : 1; }
};

// The head size of the kernel that serves one: there are `few` where scores are modified and in types other than bf16,
// since compilation takes its time.
__host__ __device__ constexpr int backward_head(bool few, int64_t head_dim) {
  if (few) return head_dim <= 64 ? 64 : head_dim <= 128 ? 128 : 256;
  return head_dim <= 32    ? 32
         : head_dim <= 64  ? 64
         : head_dim <= 96  ? 96
         : head_dim <= 128 ? 128
         : head_dim <= 192 ? 192
                           : 256;
}

// Sums of dk and dv fill a thread's registers: 2 keys head / 256 of them, at most 128. Where scores are modified, which
// takes registers of its own, tiles of queries are smaller for it.
__host__ __device__ constexpr BackwardTiles backward_tiles(int element, int head, bool modified) {
  if (element == 4) {
    return head <= 64    ? BackwardTiles{4, head, 64, 64, 2}
           : head <= 128 ? BackwardTiles{4, head, 32, 64, 2}
                         : BackwardTiles{4, head, 32, 32, 2};
  }
  const int queries = modified && head > 64 ? 32 : 64;
  return head <= 128 ? BackwardTiles{2, head, queries, 128, 4} : BackwardTiles{2, head, queries, 64, 2};
}

}  // namespace gptcore::cuda
