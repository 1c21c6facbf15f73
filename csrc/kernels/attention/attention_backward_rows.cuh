// What the backward pass needs of each row before it: lse in powers of two, delta = dout . out - dlse, zeros in dq where
// a tile sees no key, and the gradients of sinks.
#pragma once

#include "core/cuda/pack.cuh"
#include "core/cuda/reduce.cuh"
#include "kernels/attention/attention_backward_tiles.h"
#include "kernels/attention/attention_scores.cuh"

namespace gptcore::cuda {

// By tile_and_head().
struct BackwardRows {
  AttentionProblem p;
  int tiles, queries;  // of all sequences; of a tile
  bool packed;         // rows of dout and out begin at multiples of 16 bytes
  float *lse, *delta;  // of each row of each tile: lse is infinite where probabilities shall be 0
  float* sinks;        // sums of each tile, where dsinks is wanted
  int* broken;  // becomes 1 where documents' lengths are none: tiles of them may be missing, and waited for
};

// Eight lanes a row: 128 bytes of it in each access.
constexpr int kRowLanes = 8;

template <class T>
__device__ __forceinline__ float row_product(const T* x, const T* y, int size, bool packed) {
  constexpr int kPer = kPackElements<T>;
  const int own = static_cast<int>(threadIdx.x) % kRowLanes;
  const int packs = packed ? size / kPer : 0;
  float sum = 0.0f;
  for (int i = own; i < packs; i += kRowLanes) {
    float a[kPer], b[kPer];
    load_pack(x + i * kPer, a), load_pack(y + i * kPer, b);
#pragma unroll
    for (int e = 0; e < kPer; ++e) sum += a[e] * b[e];
  }
  for (int i = packs * kPer + own; i < size; i += kRowLanes) sum += to_float(x[i]) * to_float(y[i]);
  return warp_reduce<Add, kRowLanes>(sum);
}

// There are as many tiles as documents, or more.
__device__ __forceinline__ void check_lengths(const BackwardRows& c) {
  const int i = static_cast<int>(blockIdx.x);
  if (!c.p.cu_q || threadIdx.x != 0 || blockIdx.y != 0 || i >= c.p.batch) return;
  if (c.p.cu_q[i] > c.p.cu_q[i + 1] || c.p.cu_k[i] > c.p.cu_k[i + 1]) *c.broken = 1;
}

// A block a tile of queries and a head, as many blocks as there are tiles in all.
template <class T>
__global__ void __launch_bounds__(kBackwardThreads) backward_rows(const __grid_constant__ BackwardRows c) {
  const AttentionProblem& p = c.p;
  const int queries = c.queries;
  check_lengths(c);
  const TileOfBatch tile = tile_of_batch(p.cu_q, p.batch, p.queries, queries, static_cast<int>(blockIdx.x));
  const AttentionSequence s = sequence_of(p, tile.index, static_cast<int>(blockIdx.y));
  const int size = static_cast<int>(p.head_dim), end = min(tile.first + queries, s.queries);
  const bool idle = tile.first >= s.queries;
  const bool unseen = !idle && s.keys_of_queries(tile.first, end).empty();
  const T *dout = query_rows<const T>(p.dout, s), *out = query_rows<const T>(p.out, s);
  const float sink = p.dsinks ? p.sinks[s.head] * kLog2e : 0.0f;
  const int64_t place = idle ? 0 : tile_and_head(p, s, queries, tile.first / queries, s.head) * queries;
  float sinks = 0.0f;
  for (int r = static_cast<int>(threadIdx.x) / kRowLanes; r < queries && !idle;
       r += kBackwardThreads / kRowLanes) {
    const int query = tile.first + r, real = min(query, end - 1);
    float delta = row_product(dout + real * p.dout.token, out + real * p.out.token, size, c.packed);
    const float lse = lse_rows<const float>(p.lse, p, s)[real];
    const bool sees = query < end && lse != -INFINITY;
    if (p.dlse && sees) delta -= lse_rows<const float>(p.dlse, p, s)[real];
    if (threadIdx.x % kRowLanes == 0) {
      c.lse[place + r] = sees ? lse * kLog2e : INFINITY;
      c.delta[place + r] = query < end ? delta : 0.0f;
      // A sink has probability exp(sink - lse) in each row and no value: its dS is -delta times that.
      if (p.dsinks && sees) sinks -= exp2_approximate(sink - lse * kLog2e) * delta;
    }
    if (unseen && query < end) {
      T* dq = query_rows<T>(p.dq, s) + query * p.dq.token;
      for (int i = static_cast<int>(threadIdx.x) % kRowLanes; i < size; i += kRowLanes)
        dq[i] = from_float<T>(0.0f);
    }
  }
  if (!p.dsinks) return;
  const float sum = block_reduce(sinks, shared_memory<float>());
  if (threadIdx.x == 0) c.sinks[blockIdx.x * p.heads + blockIdx.y] = sum;
}

// A warp a head: over its tiles, in an order that their number gives.
template <class Sum>
__global__ void __launch_bounds__(kWarp) backward_sinks(const __grid_constant__ BackwardRows c) {
  Sum sum = 0;
  for (int tile = lane(); tile < c.tiles; tile += kWarp)
    sum += static_cast<Sum>(c.sinks[tile * c.p.heads + blockIdx.x]);
  for (int step = kWarp / 2; step > 0; step /= 2) sum += __shfl_xor_sync(kFullMask, sum, step);
  if (lane() == 0) c.p.dsinks[blockIdx.x] = static_cast<float>(sum);
}

template <class T>
void prepare_rows(const BackwardRows& c) {
  const auto tiles = static_cast<unsigned>(c.tiles), heads = static_cast<unsigned>(c.p.heads);
  launch<&backward_rows<T>>({dim3(tiles, heads), dim3(kBackwardThreads), kWarp * sizeof(float)}, c);
  if (c.p.dsinks) launch<&backward_sinks<double>>({dim3(heads), dim3(kWarp)}, c);
}

}  // namespace gptcore::cuda
