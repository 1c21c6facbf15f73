// The gradient of q out of the sums that attention's backward for sm_90 leaves of it.
#pragma once

#include "core/cuda/pack.cuh"
#include "kernels/attention/attention_backward_sm90_block.cuh"

namespace gptcore::cuda::backward_sm90 {

constexpr int kDqThreads = 256;

// dq = scale times its sums, a block a tile. A consumer's 64 x 64 lie as its threads held them: chunk j (16 bytes) of
// thread 32 w + 4 g + t is columns 8 j + 2 t and the one after it, of the rows 16 w + g and 8 further. So four
// neighbouring chunks are 16 bytes of two rows of dq. A tile that no tile of keys has added to sees nothing.
template <class T, int D>
__global__ void __launch_bounds__(kDqThreads) write_dq(const __grid_constant__ Arguments a) {
  using Tiles = TileShape<D>;
  const AttentionProblem& p = a.p;
  const TileOfBatch at =
      tile_of_batch(p.cu_q, p.batch, p.queries, Tiles::kQueries, static_cast<int>(blockIdx.x));
  const AttentionSequence s = sequence_of(p, at.index, static_cast<int>(blockIdx.y));
  if (at.first >= s.queries) return;
  const int64_t tile = tile_and_head(p, s, Tiles::kQueries, at.first / Tiles::kQueries, s.head);
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
    const int first = at.first + (D == 64 ? consumer * 64 : 0) + row;
    const int column = (D == 64 ? 0 : consumer * 64) + j * 8;
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      if (first + 8 * h >= s.queries) continue;
      store_pack<T>(query_rows<T>(p.dq, s) + (first + 8 * h) * p.dq.token + column, rows[h]);
    }
  }
}

}  // namespace gptcore::cuda::backward_sm90
