// What the kernels of attention's backward pass share: the call, where tiles lie in shared memory, and how they get there.
#pragma once

#include "core/cuda/convert.cuh"
#include "core/cuda/pack.cuh"
#include "kernels/attention/attention_backward_products.cuh"
#include "kernels/attention/attention_backward_tiles.h"
#include "kernels/attention/attention_masks.cuh"

namespace gptcore::cuda::backward_mma {

// Scratch of one call, by tile_and_head().
struct BackwardCall {
  AttentionProblem p;
  int query_tiles, key_tiles;  // of all sequences
  int stages;
  bool packed_rows;    // every row of q, k, v and dout begins at a multiple of 16 bytes
  bool pairs;          // pairs of elements may be stored to dq, dk and dv in one access
  float *lse, *delta;  // of each row of each tile: lse in powers of two, +inf where P shall be 0
  float* dq;           // sums so far, as the threads hold them
  int* turns;          // how many tiles of keys have added theirs
  float* sinks;        // sums of each tile
  int* broken;         // not 0: lengths of documents are none
};

// The first row of a tensor of queries in a tile of theirs.
template <class T>
__device__ __forceinline__ T* query_tile(const AttentionTensor& t, const AttentionSequence& s, int first,
                                         int head) {
  return static_cast<T*>(t.data) + s.index * t.batch + (s.q_begin + first) * t.token + head * t.head;
}

// What a block passes over.
struct BackwardPlan {
  AttentionSequence s;    // of the group's first head
  int first_key;          // of the tile
  int first_tile, tiles;  // of queries that see any of its keys
  int steps;              // tiles times heads
};

template <class T, int kHead, bool kModified>
struct BackwardShared {
  static constexpr BackwardTiles kTiles = backward_tiles(sizeof(T), kHead, kModified);
  unsigned char* base;

  __device__ BackwardPlan& plan() const { return *at<BackwardPlan>(0); }
  __device__ T* k() const { return at<T>(kKeys); }
  __device__ T* v() const { return at<T>(kKeys + kTiles.key_bytes()); }
  __device__ T* p() const { return at<T>(kScores); }
  __device__ T* ds() const { return at<T>(kScores + kTiles.score_bytes()); }
  __device__ T* q(int stage) const { return at<T>(stage_at(stage)); }
  __device__ T* dout(int stage) const { return at<T>(stage_at(stage) + kTiles.query_bytes()); }
  __device__ float* lse(int stage) const { return at<float>(stage_at(stage) + 2 * kTiles.query_bytes()); }
  __device__ float* delta(int stage) const { return lse(stage) + kTiles.queries; }

 private:
  static_assert(sizeof(BackwardPlan) <= BackwardTiles::kPlanBytes);
  static constexpr int kKeys = BackwardTiles::kPlanBytes;
  static constexpr int kScores = kKeys + 2 * kTiles.key_bytes();
  static constexpr int kStages = kScores + 2 * kTiles.score_bytes(), kStageBytes = kTiles.stage_bytes();

  __device__ static int stage_at(int stage) { return kStages + stage * kStageBytes; }
  template <class Element>
  __device__ Element* at(int64_t bytes) const {
    return reinterpret_cast<Element*>(base + bytes);
  }
};

// Asks for kRows rows of `from`, of which `rows` exist, into a tile; zeros for what does not exist.
template <int kRows, int kHead, int kPitch, class T>
__device__ __forceinline__ void load_tile(T* tile, const T* from, int64_t stride, int rows, int head_dim,
                                          bool packed_rows) {
  constexpr int kPer = kPackElements<T>, kChunks = kHead / kPer;
  if (packed_rows) {
#pragma unroll 2
    for (int i = 0; i < kRows * kChunks; i += kBackwardThreads) {
      const int at = i + static_cast<int>(threadIdx.x), row = at / kChunks, column = at % kChunks * kPer;
      if (kRows * kChunks % kBackwardThreads != 0 && row >= kRows) break;
      const int left = row < rows ? min(max(head_dim - column, 0), kPer) : 0;
      copy_async(tile + row * kPitch + column, left > 0 ? from + row * stride + column : from,
                 left * static_cast<int>(sizeof(T)));
    }
  } else {
    for (int at = static_cast<int>(threadIdx.x); at < kRows * kHead; at += kBackwardThreads) {
      const int row = at / kHead, column = at % kHead;
      tile[row * kPitch + column] =
          row < rows && column < head_dim ? from[row * stride + column] : from_float<T>(0.0f);
    }
  }
}

// Queries, their gradients and their rows' constants of one tile and head into a stage.
template <class T, int kHead, bool kModified>
__device__ __forceinline__ void load_stage(const BackwardCall& c, const AttentionSequence& s,
                                           const BackwardShared<T, kHead, kModified>& shared, int stage,
                                           int tile, int head) {
  constexpr BackwardTiles kTiles = BackwardShared<T, kHead, kModified>::kTiles;
  const int first = tile * kTiles.queries, rows = s.queries - first, size = static_cast<int>(c.p.head_dim);
  load_tile<kTiles.queries, kHead, kTiles.head_pitch()>(
      shared.q(stage), query_tile<const T>(c.p.q, s, first, head), c.p.q.token, rows, size, c.packed_rows);
  load_tile<kTiles.queries, kHead, kTiles.head_pitch()>(shared.dout(stage),
                                                        query_tile<const T>(c.p.dout, s, first, head),
                                                        c.p.dout.token, rows, size, c.packed_rows);
  const int64_t at = tile_and_head(c.p, s, kTiles.queries, tile, head) * kTiles.queries;
  const int thread = static_cast<int>(threadIdx.x);
  if (thread < kTiles.queries / 4) {
    copy_async(shared.lse(stage) + 4 * thread, c.lse + at + 4 * thread);
    copy_async(shared.delta(stage) + 4 * thread, c.delta + at + 4 * thread);
  }
}

template <class T, int kHead, bool kModified>
__device__ __forceinline__ void load_keys(const BackwardCall& c, const AttentionSequence& s,
                                          const BackwardShared<T, kHead, kModified>& shared, int first) {
  constexpr BackwardTiles kTiles = BackwardShared<T, kHead, kModified>::kTiles;
  const int rows = s.keys - first, size = static_cast<int>(c.p.head_dim);
  load_tile<kTiles.keys, kHead, kTiles.head_pitch()>(
      shared.k(), key_rows<const T>(c.p.k, s) + first * c.p.k.token, c.p.k.token, rows, size, c.packed_rows);
  load_tile<kTiles.keys, kHead, kTiles.head_pitch()>(
      shared.v(), key_rows<const T>(c.p.v, s) + first * c.p.v.token, c.p.v.token, rows, size, c.packed_rows);
}

// Two neighbours of a fragment to memory: columns from `column` on of `size`.
template <class T>
__device__ __forceinline__ void store_two(T* row, int column, int size, float first, float second,
                                          bool pairs) {
  if (pairs && column + 1 < size) {
    if constexpr (sizeof(T) == 4) {
      *reinterpret_cast<float2*>(row + column) = make_float2(first, second);
    } else {
      *reinterpret_cast<uint32_t*>(row + column) = pack_pair<T>(first, second);
    }
    return;
  }
  if (column < size) row[column] = from_float<T>(first);
  if (column + 1 < size) row[column + 1] = from_float<T>(second);
}

// A warp's sums to rows of `to`, scaled.
template <class T, int kRows, int kColumns>
__device__ __forceinline__ void store_sums(const Sums<kRows, kColumns>& sums, T* to, int64_t stride, int rows,
                                           int first_column, int size, float scale, bool pairs) {
  const int g = lane() / 4, t = lane() % 4;
#pragma unroll
  for (int i = 0; i < kRows; ++i) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int row = 16 * i + 8 * half + g;
      if (row >= rows) continue;
#pragma unroll
      for (int j = 0; j < kColumns; ++j) {
        const float* pair = sums.at[i][j] + 2 * half;
        store_two(to + row * stride, first_column + 8 * j + 2 * t, size, pair[0] * scale, pair[1] * scale,
                  pairs);
      }
    }
  }
}

}  // namespace gptcore::cuda::backward_mma
