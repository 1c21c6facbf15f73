// What attention's backward for sm_90 does row by row before and after its tiles: the constants of the softmax, and the
// gradient of q out of its sums.
#pragma once

#include "core/cuda/pack.cuh"
#include "core/cuda/reduce.cuh"
#include "kernels/attention/attention_backward_sm90_schedule.h"
#include "kernels/attention/attention_scores.cuh"

namespace gptcore::cuda::backward_sm90 {

constexpr int kRowThreads = 256;

struct RowArguments {
  AttentionProblem p;
  Schedule schedule;
  float *lse, *delta;  // for each query head whole tiles of queries
  const float* dq_sums;
  const int* turns;
};

// lse in powers of two and delta of every row of every tile. Rows that see nothing and those behind the last have lse
// infinite: their probabilities are 0.
template <class T, int D>
__global__ void __launch_bounds__(kRowThreads) prepare_rows(const __grid_constant__ RowArguments a) {
  constexpr int kLanes = D / kPackElements<T>, kRows = kRowThreads / kLanes;
  const AttentionProblem& p = a.p;
  const int padded = a.schedule.query_tiles() * a.schedule.query_tile;
  const int row = static_cast<int>(blockIdx.x) * kRows + static_cast<int>(threadIdx.x) / kLanes;
  const int64_t batch = blockIdx.y / p.heads, head = blockIdx.y % p.heads;
  const int column = static_cast<int>(threadIdx.x) % kLanes * kPackElements<T>;
  const bool real = row < p.queries;
  float delta = 0.0f;
  if (real) {
    float x[kPackElements<T>], y[kPackElements<T>];
    const auto at = [&](const AttentionTensor& t) {
      return static_cast<const T*>(t.data) + batch * t.batch + row * t.token + head * t.head + column;
    };
    load_pack<T>(at(p.out), x), load_pack<T>(at(p.dout), y);
#pragma unroll
    for (int i = 0; i < kPackElements<T>; ++i) delta += x[i] * y[i];
  }
  delta = warp_reduce<Add, kLanes>(delta);
  if (threadIdx.x % kLanes != 0 || row >= padded) return;
  const int64_t from = batch * p.lse_batch + head * p.lse_head + row, to = int64_t{blockIdx.y} * padded + row;
  const float lse = real ? p.lse[from] : -INFINITY;
  if (p.dlse && lse != -INFINITY) delta -= p.dlse[from];
  a.lse[to] = lse == -INFINITY ? INFINITY : lse * kLog2e;
  a.delta[to] = delta;
}

// dsinks = - sum over sequences and queries of exp(sink - lse) delta: a block a head, in an order that the shape fixes.
__global__ void __launch_bounds__(kRowThreads) sum_sinks(const __grid_constant__ RowArguments a) {
  const AttentionProblem& p = a.p;
  const int64_t padded = int64_t{a.schedule.query_tiles()} * a.schedule.query_tile;
  const float sink = p.sinks[blockIdx.x] * kLog2e;
  float sum = 0.0f;
  for (int64_t batch = 0; batch < p.batch; ++batch) {
    const int64_t first = (batch * p.heads + blockIdx.x) * padded;
    for (int64_t row = threadIdx.x; row < p.queries; row += kRowThreads)
      sum -= exp2f(sink - a.lse[first + row]) * a.delta[first + row];
  }
  sum = block_reduce(sum, shared_memory<float>());
  if (threadIdx.x == 0) p.dsinks[blockIdx.x] = sum;
}

// dq = scale times its sums, a block a tile. A consumer's 64 x 64 lie as its threads held them: chunk j (16 bytes) of
// thread 32 w + 4 g + t is columns 8 j + 2 t and the one after it, of the rows 16 w + g and 8 further. So four
// neighbouring chunks are 16 bytes of two rows of dq. A tile that no tile of keys has added to sees nothing.
template <class T, int D>
__global__ void __launch_bounds__(kRowThreads) write_dq(const __grid_constant__ RowArguments a) {
  using Tiles = TileShape<D>;
  const AttentionProblem& p = a.p;
  const int64_t tile = int64_t{blockIdx.y} * gridDim.x + blockIdx.x;
  const int64_t batch = blockIdx.y / p.heads, head = blockIdx.y % p.heads;
  const int j = static_cast<int>(threadIdx.x) % 8, group = static_cast<int>(threadIdx.x) / 8 % 32;
  const int row = group / 8 * 16 + group % 8;
#pragma unroll
  for (int consumer = 0; consumer < Tiles::kConsumers; ++consumer) {
    const int64_t index = tile * Tiles::kConsumers + consumer;
    const bool any = a.turns[index] != 0;
    const auto* chunks = reinterpret_cast<const float4*>(a.dq_sums + index * Tiles::kDqElements);
    float rows[2][8];
#pragma unroll
    for (int t = 0; t < 4; ++t) {
      const float4 c = any ? chunks[j * 128 + group * 4 + t] : make_float4(0, 0, 0, 0);
      rows[0][2 * t] = c.x * p.scale, rows[0][2 * t + 1] = c.y * p.scale;
      rows[1][2 * t] = c.z * p.scale, rows[1][2 * t + 1] = c.w * p.scale;
    }
    const int first = static_cast<int>(blockIdx.x) * Tiles::kQueries + (D == 64 ? consumer * 64 : 0) + row;
    const int column = (D == 64 ? 0 : consumer * 64) + j * 8;
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      if (first + 8 * h >= p.queries) continue;
      store_pack<T>(static_cast<T*>(p.dq.data) + batch * p.dq.batch + (first + 8 * h) * p.dq.token +
                        head * p.dq.head + column,
                    rows[h]);
    }
  }
}

}  // namespace gptcore::cuda::backward_sm90
