// Warpgroup 0 of attention's backward for sm_90: one thread fetches tiles, two warps carry dQ away.
#pragma once

#include "kernels/attention/attention_backward_sm90_block.cuh"
#include "kernels/attention/attention_boxes.cuh"

namespace gptcore::cuda::backward_sm90 {

// One thread's business.
template <int D>
__device__ __forceinline__ void fetch_tiles(const Arguments& a, const Room<D>& room) {
  using Tiles = TileShape<D>;
  const Work& work = room.work();
  const AttentionSequence& own = work.s;
  const bool packed = a.p.cu_q != nullptr;
  const auto load = [&](unsigned char* to, const TensorMap& map, uint64_t* full, int rows, BoxPlace place,
                        int head) {
#pragma unroll
    for (int c = 0; c < D; c += kPanelColumns)
      tma_load(to + c * 2 * rows, map, full, c, place.token, head, place.sequence);
  };
  const BoxPlace keys =
      box_place(packed, own.index, own.k_begin, own.keys, work.key_tile * Tiles::kKeys, Tiles::kKeys);
  mbarrier_arrive_expecting(room.keys_full(), 2 * Tiles::kKeyBytes);
  load(room.k(), a.k, room.keys_full(), Tiles::kKeys, keys, own.kv_head);
  load(room.v(), a.v, room.keys_full(), Tiles::kKeys, keys, own.kv_head);
  for (Steps s(work); s.more(); s.advance()) {
    const int stage = s.stage(), head = own.head + s.head;
    const BoxPlace queries =
        box_place(packed, own.index, own.q_begin, own.queries, s.tile * Tiles::kQueries, Tiles::kQueries);
    const int64_t row = tile_and_head(a.p, own, Tiles::kQueries, s.tile, head) * Tiles::kQueries;
    mbarrier_wait(room.empty(stage), s.parity() ^ 1);
    mbarrier_arrive_expecting(room.q_full(stage), Tiles::kQueryBytes + Tiles::kRowBytes);
    load(room.q(stage), a.q, room.q_full(stage), Tiles::kQueries, queries, head);
    bulk_load(room.lse(stage), a.lse + row, Tiles::kRowBytes, room.q_full(stage));
    mbarrier_arrive_expecting(room.dout_full(stage), Tiles::kQueryBytes + Tiles::kRowBytes);
    load(room.dout(stage), a.dout, room.dout_full(stage), Tiles::kQueries, queries, head);
    bulk_load(room.delta(stage), a.delta + row, Tiles::kRowBytes, room.dout_full(stage));
  }
}

// A warp that carries the dQ of one consumer to global memory: the first tile of keys stores, the others add, each when
// the one before it has. The next dQ may be written when this one has been read.
template <int D>
__device__ __forceinline__ void carry_dq(const Arguments& a, const Room<D>& room, int consumer) {
  using Tiles = TileShape<D>;
  constexpr int kThreads = kWarpgroup + kWarp;
  const Work& work = room.work();
  named_barrier_arrive(dq_taken(consumer), kThreads);
  for (Steps s(work); s.more();) {
    const int turn = work.key_tile - first_key_tile(work.s, s.tile, Tiles::kKeys, Tiles::kQueries);
    const int64_t tile = tile_and_head(a.p, work.s, Tiles::kQueries, s.tile, work.s.head + s.head);
    const int64_t index = tile * Tiles::kConsumers + consumer;
    if (lane() == 0) wait_for(a.turns + index, turn);
    __syncwarp();  // a warp comes to a barrier as a whole
    named_barrier(dq_written(consumer), kThreads);
    s.advance();
    if (lane() == 0) {
      float* to = a.dq_sums + index * Tiles::kDqElements;
      async_proxy_fence_global();
      if (turn == 0) {
        bulk_store(to, room.dq(consumer), Tiles::kDqElements * 4);
      } else {
        bulk_add(to, room.dq(consumer), Tiles::kDqElements * 4);
      }
      bulk_commit();
      bulk_wait_read<0>();
    }
    __syncwarp();
    if (s.more()) named_barrier_arrive(dq_taken(consumer), kThreads);
    if (lane() == 0) {
      bulk_wait<0>();
      async_proxy_fence_global();
      signal(a.turns + index);
    }
  }
}

}  // namespace gptcore::cuda::backward_sm90
