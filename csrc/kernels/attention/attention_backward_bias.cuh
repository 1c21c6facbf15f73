// The gradient of attention's bias, a pass of its own: dS once more for each pair of tiles, summed in registers over the
// sequences and heads that share the bias, in order.
#pragma once

#include "kernels/attention/attention_backward_scores.cuh"

namespace gptcore::cuda::backward_mma {

template <class T, int kHead>
__device__ __forceinline__ void add_score_gradients(const BackwardCall& c, const AttentionSequence& s,
                                                    int first_query, int first_key,
                                                    typename ScoreTile<T, kHead, true>::Scores& sum) {
  using Tile = ScoreTile<T, kHead, true>;
  constexpr BackwardTiles kTiles = Tile::kTiles;
  const KeyRange seen = s.queries_of_keys(first_key, min(first_key + kTiles.keys, s.keys));
  if (seen.end <= first_query || seen.begin >= first_query + kTiles.queries ||
      !s.visits(first_query, first_query + kTiles.queries, first_key, first_key + kTiles.keys)) {
    return;
  }
  const BackwardShared<T, kHead, true> shared{shared_memory()};
  __syncthreads();  // all are done with the tiles before
  load_keys(c, s, shared, first_key);
  load_stage(c, s, shared, 0, first_query / kTiles.queries, s.head);
  copy_async_commit();
  copy_async_wait<0>();
  __syncthreads();
  const Tile tile(c, s, s.head, first_query, first_key);
  typename Tile::Scores p, dp;
  uint32_t kept;
  tile.product(p, shared.q(0), shared.k());
  tile.probabilities(p, shared.lse(0), kept, nullptr);
  tile.product(dp, shared.dout(0), shared.v());
  tile.gradients(p, dp, shared.delta(0), kept);
#pragma unroll
  for (int i = 0; i < Tile::kCount; ++i) sum.flat()[i] += dp.flat()[i];
}

// A block a pair of tiles and a slice of dbias.
template <class T, int kHead>
__global__ void __launch_bounds__(kBackwardThreads, 1) backward_bias(const BackwardCall c) {
  using Tile = ScoreTile<T, kHead, true>;
  const AttentionProblem& p = c.p;
  const int queries = static_cast<int>(p.queries), keys = static_cast<int>(p.keys);
  const int columns = (keys + Tile::kTiles.keys - 1) / Tile::kTiles.keys;
  const int pairs = (queries + Tile::kTiles.queries - 1) / Tile::kTiles.queries * columns;
  const int pair = static_cast<int>(blockIdx.x) % pairs, slice = static_cast<int>(blockIdx.x) / pairs;
  const int first_query = pair / columns * Tile::kTiles.queries;
  const int first_key = pair % columns * Tile::kTiles.keys;
  const int own_heads = p.dbias_heads ? static_cast<int>(p.heads) : 1;
  const int slice_batch = slice / own_heads;
  const int slice_head = slice % own_heads;
  typename Tile::Scores sum;
  sum.clear();
  for (int i = p.dbias_batches ? slice_batch : 0; i < (p.dbias_batches ? slice_batch + 1 : p.batch); ++i) {
    for (int h = p.dbias_heads ? slice_head : 0; h < (p.dbias_heads ? slice_head + 1 : p.heads); ++h)
      add_score_gradients<T, kHead>(c, sequence_of(p, i, h), first_query, first_key, sum);
  }
  float* dbias = static_cast<float*>(p.dbias.data) + slice_batch * p.dbias.batch + slice_head * p.dbias.head;
  const AttentionSequence none{};
  const Tile tile(c, none, 0, first_query, first_key);
  const float (&flat)[Tile::kCount] = sum.flat();
#pragma unroll
  for (int i = 0; i < Tile::kCount; ++i) {
    const int query = tile.query_of(i), key = tile.key_of(i);
    if (query < queries && key < keys) dbias[query * p.dbias.token + key] = flat[i];
  }
}

}  // namespace gptcore::cuda::backward_mma
