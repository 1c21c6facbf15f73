// The main kernel of attention's backward pass: a block passes over the tiles of queries that see a tile of keys.
#pragma once

#include "kernels/attention/attention_backward_scores.cuh"

namespace gptcore::cuda::backward_mma {

template <class T, int kHead, bool kModified>
class KeyTile {
 public:
  using Shared = BackwardShared<T, kHead, kModified>;
  static constexpr BackwardTiles kTiles = Shared::kTiles;
  static constexpr int kHeadWarps = 8 / kTiles.key_warps;
  using Tile = ScoreTile<T, kHead, kModified>;
  using KeySums = Sums<kTiles.keys / kTiles.key_warps / 16, kHead / kHeadWarps / 8>;
  using QuerySums = Sums<kTiles.queries / 32, kHead / 32>;

  __device__ __forceinline__ KeyTile(const BackwardCall& c, const Shared& shared)
      : c_(c), shared_(shared), plan_(shared.plan()) {}

  __device__ __forceinline__ void run() const {
    KeySums dk, dv;
    dk.clear(), dv.clear();
    load_keys(c_, plan_.s, shared_, plan_.first_key);
    int before = -1, step = next(-1);
    if (step < plan_.steps && c_.stages == 2) load(step, 0);
    copy_async_commit();
    for (int stage = 0; step < plan_.steps;) {
      copy_async_wait<0>();
      __syncthreads();  // the stage is there, and all are done with the step before
      signal_turn(before, 1);
      const int following = next(step);
      if (c_.stages == 2) {
        if (following < plan_.steps) load(following, stage ^ 1);
        copy_async_commit();
      } else {
        load(step, 0);
        copy_async_commit();
        copy_async_wait<0>();
        __syncthreads();
      }
      pair(step, stage, dk, dv);
      before = step, step = following;
      if (c_.stages == 2) stage ^= 1;
    }
    copy_async_wait<0>();
    __syncthreads();
    signal_turn(before, 0);
    write(dk, dv);
  }

 private:
  // Steps are numbered by heads, then tiles of queries.
  __device__ __forceinline__ int tile_of(int step) const { return plan_.first_tile + step % plan_.tiles; }
  __device__ __forceinline__ int head_of(int step) const { return plan_.s.head + step / plan_.tiles; }

  // The next step at which anything is seen.
  __device__ __forceinline__ int next(int step) const {
    do {
      ++step;
    } while (kModified && step < plan_.steps && !visits(tile_of(step), plan_.first_key));
    return step;
  }
  __device__ __forceinline__ bool visits(int tile, int key) const {
    return plan_.s.visits(tile * kTiles.queries, (tile + 1) * kTiles.queries, key, key + kTiles.keys);
  }
  __device__ __forceinline__ void load(int step, int stage) const {
    load_stage(c_, plan_.s, shared_, stage, tile_of(step), head_of(step));
  }

  // How many tiles of keys add to a tile's dq ahead of this one; less than 0 where this is the last: -1 - as many.
  __device__ __forceinline__ int turn_of(int tile) const {
    const AttentionSequence& s = plan_.s;
    const KeyRange seen =
        s.keys_of_queries(tile * kTiles.queries, min((tile + 1) * kTiles.queries, s.queries));
    const int own = plan_.first_key / kTiles.keys, end = (seen.end + kTiles.keys - 1) / kTiles.keys;
    const int begin = seen.begin / kTiles.keys;
    if (!kModified || s.stride == 0) return own == begin ? own - end : end - 1 - own;
    int before = 0, after = 0;  // of a pattern, those that it visits
    for (int at = begin; at < end; at += kWarp) {
      const int other = at + lane();
      const bool visitor = other < end && visits(tile, other * kTiles.keys);
      before += __popc(__ballot_sync(kFullMask, visitor && other > own));
      after += __popc(__ballot_sync(kFullMask, visitor && other < own));
    }
    return after == 0 ? -1 - before : before;
  }
  __device__ __forceinline__ int64_t place_of(int step) const {
    return tile_and_head(c_.p, plan_.s, kTiles.queries, tile_of(step), head_of(step));
  }
  // By the first thread of warp `by`, behind a barrier after the step's last store.
  __device__ __forceinline__ void signal_turn(int step, int by) const {
    if (step >= 0 && static_cast<int>(threadIdx.x) == by * kWarp) signal(c_.turns + place_of(step));
  }

  __device__ __forceinline__ void pair(int step, int stage, KeySums& dk, KeySums& dv) const {
    const int turn = turn_of(tile_of(step)), before = turn < 0 ? -1 - turn : turn;
    if (before > 0 && threadIdx.x == 0) wait_for(c_.turns + place_of(step), before);
    const Tile tile(c_, plan_.s, head_of(step), tile_of(step) * kTiles.queries, plan_.first_key);
    {
      typename Tile::Scores p, dp;
      uint32_t kept;
      tile.product(p, shared_.q(stage), shared_.k());
      probabilities(tile, p, stage, kept);
      tile.product(dp, shared_.dout(stage), shared_.v());
      tile.gradients(p, dp, shared_.delta(stage), kept);
      tile.store(shared_.ds(), dp, ~0u);
    }
    __syncthreads();  // P and dS of all warps are there, and the turn has come
    QuerySums dq;
    float4* sums = reinterpret_cast<float4*>(c_.dq + place_of(step) * (kTiles.queries * kHead)) + threadIdx.x;
    load_sums(dq, sums, before > 0);
    const int key = warp() % kTiles.key_warps * (kTiles.keys / kTiles.key_warps);
    const int column = warp() / kTiles.key_warps * (kHead / kHeadWarps);
    multiply<kTiles.queries, Depth::down_rows, kTiles.score_pitch(), Depth::down_rows, kTiles.head_pitch()>(
        dv, shared_.p() + key, shared_.dout(stage) + column);
    multiply<kTiles.queries, Depth::down_rows, kTiles.score_pitch(), Depth::down_rows, kTiles.head_pitch()>(
        dk, shared_.ds() + key, shared_.q(stage) + column);
    const int row = warp() / 4 * (kTiles.queries / 2), head_column = warp() % 4 * (kHead / 4);
    multiply<kTiles.keys, Depth::along_rows, kTiles.score_pitch(), Depth::down_rows, kTiles.head_pitch()>(
        dq, shared_.ds() + row * kTiles.score_pitch(), shared_.k() + head_column);
    if (turn >= 0) {
      store_partial(dq, sums);
      return;
    }
    const int first = tile_of(step) * kTiles.queries + row;
    store_sums(dq, query_tile<T>(c_.p.dq, plan_.s, first, head_of(step)), c_.p.dq.token,
               plan_.s.queries - first, head_column, static_cast<int>(c_.p.head_dim), c_.p.scale, c_.pairs);
  }

  // P, as far as it is kept, goes to shared memory; in registers stays what the scores' gradients take of it.
  __device__ __forceinline__ void probabilities(const Tile& tile, typename Tile::Scores& p, int stage,
                                                uint32_t& kept) const {
    if constexpr (kModified) {
      if (c_.p.soft_cap > 0.0f) {
        float slopes[Tile::kCount];
        tile.probabilities(p, shared_.lse(stage), kept, slopes);
        tile.store(shared_.p(), p, kept);
        float (&flat)[Tile::kCount] = p.flat();
#pragma unroll
        for (int i = 0; i < Tile::kCount; ++i) flat[i] *= slopes[i];
        return;
      }
    }
    tile.probabilities(p, shared_.lse(stage), kept, nullptr);
    tile.store(shared_.p(), p, kept);
  }

  // Sums in memory lie by value and thread, so that each access is one piece.
  __device__ __forceinline__ static void load_sums(QuerySums& dq, const float4* sums, bool some) {
    if (!some) {
      dq.clear();
      return;
    }
#pragma unroll
    for (int i = 0; i < kTiles.queries / 32; ++i) {
#pragma unroll
      for (int j = 0; j < kHead / 32; ++j) {
        // Past the first-level cache, which does not know what other multiprocessors wrote.
        const float4 x = __ldcg(sums + (i * (kHead / 32) + j) * kBackwardThreads);
        dq.at[i][j][0] = x.x, dq.at[i][j][1] = x.y, dq.at[i][j][2] = x.z, dq.at[i][j][3] = x.w;
      }
    }
  }
  __device__ __forceinline__ static void store_partial(const QuerySums& dq, float4* sums) {
#pragma unroll
    for (int i = 0; i < kTiles.queries / 32; ++i) {
#pragma unroll
      for (int j = 0; j < kHead / 32; ++j) {
        const float (&x)[4] = dq.at[i][j];
        __stcg(sums + (i * (kHead / 32) + j) * kBackwardThreads, make_float4(x[0], x[1], x[2], x[3]));
      }
    }
  }

  __device__ __forceinline__ void write(const KeySums& dk, const KeySums& dv) const {
    const int key = plan_.first_key + warp() % kTiles.key_warps * (kTiles.keys / kTiles.key_warps);
    const int column = warp() / kTiles.key_warps * (kHead / kHeadWarps),
              size = static_cast<int>(c_.p.head_dim);
    store_sums(dk, key_rows<T>(c_.p.dk, plan_.s) + key * c_.p.dk.token, c_.p.dk.token, plan_.s.keys - key,
               column, size, c_.p.scale, c_.pairs);
    store_sums(dv, key_rows<T>(c_.p.dv, plan_.s) + key * c_.p.dv.token, c_.p.dv.token, plan_.s.keys - key,
               column, size, kModified ? c_.p.keep_scale : 1.0f, c_.pairs);
  }

  const BackwardCall& c_;
  const Shared& shared_;
  const BackwardPlan& plan_;
};

template <class T, int kHead, bool kModified>
__global__ void __launch_bounds__(kBackwardThreads, 1) backward_keys(const BackwardCall c) {
  constexpr BackwardTiles kTiles = backward_tiles(sizeof(T), kHead, kModified);
  if (c.p.cu_k && *c.broken) return;
  const BackwardShared<T, kHead, kModified> shared{shared_memory()};
  const TileOfBatch tile =
      tile_of_batch(c.p.cu_k, c.p.batch, c.p.keys, kTiles.keys, static_cast<int>(blockIdx.x));
  BackwardPlan& plan = shared.plan();
  if (threadIdx.x == 0) {
    const int group = static_cast<int>(c.p.heads / c.p.kv_heads);
    const AttentionSequence s = sequence_of(c.p, tile.index, static_cast<int>(blockIdx.y) * group);
    const KeyRange seen = s.queries_of_keys(tile.first, min(tile.first + kTiles.keys, s.keys));
    const int first = seen.begin / kTiles.queries;
    const int tiles = seen.empty() ? 0 : (seen.end + kTiles.queries - 1) / kTiles.queries - first;
    plan = {s, tile.first, first, tiles, tiles * group};
  }
  __syncthreads();
  if (tile.first < plan.s.keys) KeyTile<T, kHead, kModified>(c, shared).run();
}

}  // namespace gptcore::cuda::backward_mma
