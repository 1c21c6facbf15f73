// A block of attention's backward for sm_90: what it is told, what it works on and in which order, and where that lies in
// its shared memory.
#pragma once

#include "core/cuda/hopper.cuh"
#include "kernels/attention/attention_backward_sm90_schedule.h"

namespace gptcore::cuda::backward_sm90 {

struct Arguments {
  TensorMap q, dout, k, v;  // attention_boxes.cuh
  AttentionProblem p;
  BlockOrder order;
  const float *lse, *delta;  // by tile_and_head(): attention_backward_rows.cuh
  float* dq_sums;            // of the same, for each consumer 64 x 64, as its threads hold them
  int* turns;                // of the same: how many tiles of keys have been added
  const int* broken;         // not 0: lengths of documents are none
};

// Of all threads: in shared memory, since registers are for sums.
struct Work {
  AttentionSequence s;  // of the group's first query head
  int group;            // query heads
  int key_tile;         // less than 0: none
  TileRange tiles;      // of queries, those that see any of its keys
};

// What this block works on. All lanes of a warp come. Packed documents have more blocks than tiles.
template <int D>
__device__ __forceinline__ Work find_work(const Arguments& a) {
  using Tiles = TileShape<D>;
  const AttentionProblem& p = a.p;
  const BlockOrder::Place place = a.order.place_of(static_cast<int>(blockIdx.x));
  const int kv_heads = static_cast<int>(p.kv_heads), group = static_cast<int>(p.heads) / kv_heads;
  Work w{{}, group, place.tile, {}};
  if (!p.cu_k) {
    w.s = sequence_of(p, place.member / kv_heads, place.member % kv_heads * group);
  } else {
    const TileOfBatch tile = tile_of_batch(p.cu_k, p.batch, p.total_k, Tiles::kKeys, place.tile);
    w.s = sequence_of(p, tile.index, place.member * group);
    const int last = (w.s.keys + Tiles::kKeys - 1) / Tiles::kKeys - 1;
    w.key_tile = *a.broken ? -1 : last - tile.first / Tiles::kKeys;  // the first of a document first
  }
  w.tiles = queries_of(w.s, max(w.key_tile, 0), Tiles::kKeys, Tiles::kQueries);
  return w;
}

// The tiles of queries of a block, in its order: every thread's own count of where it is.
struct Steps {
  const Work& work;
  int tile, head, step = 0;  // head: of the group

  __device__ explicit Steps(const Work& w)
      : work(w), tile(w.tiles.end - 1), head(w.tiles.end > w.tiles.begin ? 0 : w.group) {}
  __device__ bool more() const { return head < work.group; }
  __device__ void advance() {
    ++step;
    if (--tile < work.tiles.begin) tile = work.tiles.end - 1, ++head;
  }
  // Of the two stages; what is loaded into it ends that phase.
  __device__ int stage() const { return step % 2; }
  __device__ unsigned parity() const { return static_cast<unsigned>(step / 2) % 2; }
};

// A block's shared memory.
template <int D>
struct Room {
  using Tiles = TileShape<D>;
  static_assert(sizeof(Work) <= Tiles::kWorkBytes && Tiles::kWork % alignof(Work) == 0);
  unsigned char* base;

  __device__ unsigned char* k() const { return base + Tiles::kK; }
  __device__ unsigned char* v() const { return base + Tiles::kV; }
  __device__ unsigned char* q(int stage) const { return base + Tiles::kQ + stage * Tiles::kQueryBytes; }
  __device__ unsigned char* dout(int stage) const { return base + Tiles::kDout + stage * Tiles::kQueryBytes; }
  __device__ unsigned char* ds(int step) const {
    return base + Tiles::kDs + step % 2 * Tiles::kGradientBytes;
  }
  __device__ float* dq(int consumer) const {
    return reinterpret_cast<float*>(base + Tiles::kDq) + consumer * Tiles::kDqElements;
  }
  __device__ float* lse(int stage) const {
    return reinterpret_cast<float*>(base + Tiles::kLse + stage * Tiles::kRowBytes);
  }
  __device__ float* delta(int stage) const {
    return reinterpret_cast<float*>(base + Tiles::kDelta + stage * Tiles::kRowBytes);
  }
  __device__ uint64_t* barrier(int i) const {
    return reinterpret_cast<uint64_t*>(base + Tiles::kBarriers) + i;
  }
  __device__ uint64_t* keys_full() const { return barrier(0); }
  __device__ uint64_t* q_full(int stage) const { return barrier(1 + stage); }
  __device__ uint64_t* dout_full(int stage) const { return barrier(3 + stage); }
  __device__ uint64_t* empty(int stage) const { return barrier(5 + stage); }
  __device__ Work& work() const { return *reinterpret_cast<Work*>(base + Tiles::kWork); }
};

// Barriers of threads; 0 is __syncthreads().
constexpr int kGradientsWritten = 1;  // both consumers
__device__ __forceinline__ int dq_written(int consumer) {
  return 2 + consumer;
}  // a consumer and its carrier
__device__ __forceinline__ int dq_taken(int consumer) { return 4 + consumer; }

}  // namespace gptcore::cuda::backward_sm90
