// The kernel of attention's backward for sm_90. A block keeps 128 keys and values and goes over tiles of queries:
//
//   S' = K Q'   dP' = V dO'     (keys by queries) by wgmma into registers
//   P' = exp2(S' - lse)   dS' = P' (dP' - delta)
//   dV += P' dO   dK += dS' Q   P' and dS' from registers, where they already lie as wgmma's first operand
//   dQ = dS K                   dS from shared memory, with all 128 keys
//
// Warpgroup 0 moves data: one thread fetches tiles, two others add the dQ of each consumer to global memory, in turn
// with other blocks (Schedule). Warpgroups 1 and 2 compute, with 64 keys each but for dQ, of which each takes
// 64 x 64 for all keys: columns where D is 128, queries where it is 64.
#pragma once

#include "core/cuda/wgmma.cuh"
#include "kernels/attention/attention_backward_sm90_schedule.h"
#include "kernels/attention/attention_backward_sm90_scores.cuh"
#include "kernels/attention/attention_body.h"

namespace gptcore::cuda::backward_sm90 {

struct Arguments {
  TensorMap q, dout, k, v;  // columns, tokens, heads, sequences
  Schedule schedule;
  const float *lse, *delta;  // for each query head whole tiles of queries: attention_backward_rows.cuh
  float* dq_sums;            // for each query head, tile and consumer 64 x 64, as its threads hold them
  int* turns;                // of the same: how many tiles of keys have been added
  AttentionTensor dk, dv;
  int kv_heads;
  float scale;
  Modifiers modifiers;
};

// The tiles of queries of a block, in its order: every thread's own count of where it is.
struct Steps {
  TileRange tiles;
  int tile, head = 0, step = 0, count;

  __device__ Steps(const Schedule& s, int key_tile)
      : tiles(s.queries_of(key_tile)),
        tile(tiles.end - 1),
        count(tiles.end > tiles.begin ? s.group * (tiles.end - tiles.begin) : 0) {}
  __device__ bool more() const { return step < count; }
  __device__ void advance() {
    ++step;
    if (--tile < tiles.begin) tile = tiles.end - 1, ++head;
  }
  // Of the two stages; what is loaded into it ends that phase.
  __device__ int stage() const { return step % 2; }
  __device__ unsigned parity() const { return static_cast<unsigned>(step / 2) % 2; }
};

// A block's shared memory.
template <int D>
struct Room {
  using Tiles = TileShape<D>;
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
};

// Barriers of threads; 0 is __syncthreads().
constexpr int kGradientsWritten = 1;  // both consumers
__device__ __forceinline__ int dq_written(int consumer) {
  return 2 + consumer;
}  // a consumer and its carrier
__device__ __forceinline__ int dq_taken(int consumer) { return 4 + consumer; }

// --- warpgroup 0 -----------------------------------------------------------------------------------------------

template <int D>
__device__ __forceinline__ void fetch_tiles(const Arguments& a, const Room<D>& room, Schedule::Place place) {
  using Tiles = TileShape<D>;
  const int batch = place.member / a.kv_heads, kv_head = place.member % a.kv_heads;
  const auto load = [&](unsigned char* to, const TensorMap& map, uint64_t* full, int rows, int first,
                        int head) {
#pragma unroll
    for (int box = 0; box < Tiles::kBoxes; ++box)
      tma_load(to + box * rows * 128, map, full, box * Tiles::kBox, first, head, batch);
  };
  mbarrier_arrive_expecting(room.keys_full(), 2 * Tiles::kKeyBytes);
  load(room.k(), a.k, room.keys_full(), Tiles::kKeys, place.tile * Tiles::kKeys, kv_head);
  load(room.v(), a.v, room.keys_full(), Tiles::kKeys, place.tile * Tiles::kKeys, kv_head);
  const int64_t padded = int64_t{a.schedule.query_tiles()} * Tiles::kQueries;
  for (Steps s(a.schedule, place.tile); s.more(); s.advance()) {
    const int stage = s.stage(), first = s.tile * Tiles::kQueries, head = kv_head * a.schedule.group + s.head;
    const int64_t row = (int64_t{place.member} * a.schedule.group + s.head) * padded + first;
    mbarrier_wait(room.empty(stage), s.parity() ^ 1);
    mbarrier_arrive_expecting(room.q_full(stage), Tiles::kQueryBytes + Tiles::kRowBytes);
    load(room.q(stage), a.q, room.q_full(stage), Tiles::kQueries, first, head);
    bulk_load(room.lse(stage), a.lse + row, Tiles::kRowBytes, room.q_full(stage));
    mbarrier_arrive_expecting(room.dout_full(stage), Tiles::kQueryBytes + Tiles::kRowBytes);
    load(room.dout(stage), a.dout, room.dout_full(stage), Tiles::kQueries, first, head);
    bulk_load(room.delta(stage), a.delta + row, Tiles::kRowBytes, room.dout_full(stage));
  }
}

// A warp that carries the dQ of one consumer to global memory: the first tile of keys stores, the others add, each when
// the one before it has. The next dQ may be written when this one has been read.
template <int D>
__device__ __forceinline__ void carry_dq(const Arguments& a, const Room<D>& room, Schedule::Place place,
                                         int consumer) {
  using Tiles = TileShape<D>;
  constexpr int kThreads = kWarpgroup + kWarp;
  named_barrier_arrive(dq_taken(consumer), kThreads);
  for (Steps s(a.schedule, place.tile); s.more();) {
    const int turn = place.tile - a.schedule.first_key_tile(s.tile);
    const int64_t tile =
        (int64_t{place.member} * a.schedule.group + s.head) * a.schedule.query_tiles() + s.tile;
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

// --- warpgroups 1 and 2 ----------------------------------------------------------------------------------------

// What a consumer's products read, as wgmma describes it: its rows of K or V,
template <int D>
__device__ __forceinline__ uint64_t rows_operand(const void* tile, int consumer) {
  return k_major_operand<128>(tile) + static_cast<uint64_t>(consumer) * k_major_rows<128>(64);
}
// and, for dQ, its queries of dS' (D 64) or all of them, and K's columns, all or its own (D 128).
template <int D>
__device__ __forceinline__ uint64_t gradients_operand(const void* tile, int consumer) {
  constexpr int kKeys = TileShape<D>::kKeys;
  return mn_major_operand<128, kKeys>(tile) +
         (D == 64 ? static_cast<uint64_t>(consumer) * mn_major_rows<128, kKeys>(64) : 0);
}
template <int D>
__device__ __forceinline__ uint64_t columns_operand(const void* tile, int consumer) {
  constexpr int kKeys = TileShape<D>::kKeys;
  return mn_major_operand<128, kKeys>(tile) +
         (D == 128 ? static_cast<uint64_t>(consumer) * mn_major_rows<128, kKeys>(64) : 0);
}

// d = the consumer's 64 rows at `a` times the tile of queries, transposed.
template <class T, int D>
__device__ __forceinline__ void multiply_rows(float (&d)[TileShape<D>::kQueries / 2], uint64_t a,
                                              const void* queries) {
  using Tiles = TileShape<D>;
  const uint64_t b = k_major_operand<128>(queries);
  wgmma_fence(d);
#pragma unroll
  for (int i = 0; i < D / 16; ++i) {
    wgmma<Tiles::kQueries, T, Major::k, Major::k>(d, a + k_major_step<128, Tiles::kKeys>(i),
                                                  b + k_major_step<128, Tiles::kQueries>(i), i > 0);
  }
  wgmma_commit();
}

// The operands of products that are done, or about to begin.
template <int kCount>
__device__ __forceinline__ void pin_all(uint32_t (&a)[kCount][4]) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) pin(a[i]);
}

// d += a (keys by queries) times the tile of queries.
template <class T, int D>
__device__ __forceinline__ void add_products(float (&d)[D / 2], uint32_t (&a)[TileShape<D>::kQueries / 16][4],
                                             const void* queries) {
  using Tiles = TileShape<D>;
  const uint64_t b = mn_major_operand<128, Tiles::kQueries>(queries);
  pin_all(a);
  wgmma_fence(d);
#pragma unroll
  for (int i = 0; i < Tiles::kQueries / 16; ++i)
    wgmma<D, T, Major::mn>(d, a[i], b + mn_major_step<128>(i), true);
  wgmma_commit();
}

// The operand of dK, transposed, to shared memory as that of dQ: a row of 64 queries a key, swizzled.
template <int kQueries>
__device__ __forceinline__ void store_gradients(const uint32_t (&ds)[kQueries / 16][4], unsigned char* tile,
                                                int consumer) {
  const int group = lane() / 4, row = consumer * 64 + static_cast<int>(threadIdx.x) / kWarp % 4 * 16 + group;
  const int mine = row * 128 + (group << 4) + lane() % 4 * 4;
#pragma unroll
  for (int j = 0; j < kQueries / 8; ++j) {
    unsigned char* at = tile + j / 8 * (TileShape<64>::kKeys * 128) + (mine ^ j % 8 << 4);
    *reinterpret_cast<uint32_t*>(at) = ds[j / 2][j % 2 * 2];
    *reinterpret_cast<uint32_t*>(at + 8 * 128) = ds[j / 2][j % 2 * 2 + 1];
  }
}

// 64 rows of dK or dV, those that exist.
template <class T, int D>
__device__ __forceinline__ void write_rows(const float (&sums)[D / 2], float scale, const AttentionTensor& to,
                                           int batch, int head, int first, int keys) {
  const int row = first + static_cast<int>(threadIdx.x) / kWarp % 4 * 16 + lane() / 4;
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    if (row + 8 * h >= keys) continue;
    T* out = static_cast<T*>(to.data) + batch * to.batch + (row + 8 * h) * to.token + head * to.head +
             lane() % 4 * 2;
#pragma unroll
    for (int j = 0; j < D / 8; ++j) {
      *reinterpret_cast<uint32_t*>(out + 8 * j) =
          pack_pair<T>(sums[4 * j + 2 * h] * scale, sums[4 * j + 2 * h + 1] * scale);
    }
  }
}

template <class T, int D, bool kModified>
__device__ __forceinline__ void consume(const Arguments& a, const Room<D>& room, Schedule::Place place,
                                        int consumer) {
  using Tiles = TileShape<D>;
  constexpr int kQueries = Tiles::kQueries;
  // Whether dP' waits for P', and dS' for dV: with D 64, where a tile takes 64 registers, modifiers leave no room else.
  constexpr bool kLate = kModified && D == 64;
  const Schedule& schedule = a.schedule;
  const Modifiers& m = a.modifiers;
  const int batch = place.member / a.kv_heads, kv_head = place.member % a.kv_heads;
  const int first_key = place.tile * Tiles::kKeys + consumer * 64;
  float dk[D / 2] = {}, dv[D / 2] = {}, scores[kQueries / 2];
  Steps s(schedule, place.tile);
  mbarrier_wait(room.keys_full(), 0);
  if (!s.more()) {
    write_rows<T, D>(dk, 0.0f, a.dk, batch, kv_head, first_key, schedule.keys);
    write_rows<T, D>(dv, 0.0f, a.dv, batch, kv_head, first_key, schedule.keys);
    return;
  }
  pin(dk), pin(dv);
  KeptElements<kQueries> kept =
      draw_kept<kQueries, kModified>(m, first_key, s.tile * kQueries, place.member * schedule.group + s.head);
  mbarrier_wait(room.q_full(0), 0);
  multiply_rows<T, D>(scores, rows_operand<D>(room.k(), consumer), room.q(0));
  wgmma_wait<0>(scores);
  do {
    pin(consumer);  // registers are for sums
    const int stage = s.stage(), step = s.step, head = kv_head * schedule.group + s.head;
    float factors[kQueries / 2], gradients[kQueries / 2], dq[32];
    uint32_t p[kQueries / 16][4], ds[kQueries / 16][4];
    const ScoreTile tile(first_key, s.tile * kQueries, kQueries, schedule.keys, schedule.shift(),
                         schedule.left, schedule.right);
    const auto multiply_gradients = [&] {
      mbarrier_wait(room.dout_full(stage), s.parity());
      multiply_rows<T, D>(gradients, rows_operand<D>(room.v(), consumer), room.dout(stage));
    };
    if constexpr (!kLate) multiply_gradients();

    const float slope =
        kModified && m.slopes ? m.slopes[batch * m.slopes_batch + head * m.slopes_head] * kLog2e : 0.0f;
    const float* lse = room.lse(stage) + lane() % 4 * 2;
    if (tile.whole) {
      Probabilities<T, kQueries, kModified, false>{a.scale, m, slope, tile, kept}.all(scores, lse, factors,
                                                                                      p);
    } else {
      Probabilities<T, kQueries, kModified, true>{a.scale, m, slope, tile, kept}.all(scores, lse, factors, p);
    }
    add_products<T, D>(dv, p, room.dout(stage));

    if constexpr (kLate) {
      multiply_gradients();
      wgmma_wait<0>(gradients, dv);
      pin_all(p);
    } else {
      wgmma_wait<1>(gradients);
    }
    ScoreGradients<T, kQueries, kModified>{m.keep_scale, kept}.all(factors, gradients,
                                                                   room.delta(stage) + lane() % 4 * 2, ds);
    store_gradients<kQueries>(ds, room.ds(step), consumer);
    add_products<T, D>(dk, ds, room.q(stage));
    async_proxy_fence();
    named_barrier(kGradientsWritten, Tiles::kConsumers * kWarpgroup);
    wgmma_wait<1>(dv);
    if constexpr (!kLate) pin_all(p);

    const uint64_t ds_operand = gradients_operand<D>(room.ds(step), consumer);
    const uint64_t k_operand = columns_operand<D>(room.k(), consumer);
    wgmma_fence(dq);
#pragma unroll
    for (int i = 0; i < Tiles::kKeys / 16; ++i) {
      wgmma<64, T, Major::mn, Major::mn>(dq, ds_operand + mn_major_step<128>(i),
                                         k_operand + mn_major_step<128>(i), i > 0);
    }
    wgmma_commit();
    s.advance();
    // What does not need many registers, while they are few and products under way.
    const KeptElements<kQueries> kept_next = draw_kept<kQueries, kModified>(
        m, first_key, s.tile * kQueries, place.member * schedule.group + s.head);
    // The next scores, while dQ leaves; behind the last tile again some that nobody reads, so that one wait fits all.
    if (s.more()) mbarrier_wait(room.q_full(s.stage()), s.parity());
    discard(scores);
    multiply_rows<T, D>(scores, rows_operand<D>(room.k(), consumer), room.q(s.stage()));
    wgmma_wait<1>(dq, dk);
    pin_all(ds);
    __syncwarp();
    if (lane() == 0) mbarrier_arrive(room.empty(stage));

    named_barrier(dq_taken(consumer), kWarpgroup + kWarp);
    float4* out = reinterpret_cast<float4*>(room.dq(consumer)) + threadIdx.x % kWarpgroup;
#pragma unroll
    for (int i = 0; i < 8; ++i)
      out[i * kWarpgroup] = make_float4(dq[4 * i], dq[4 * i + 1], dq[4 * i + 2], dq[4 * i + 3]);
    async_proxy_fence();
    named_barrier_arrive(dq_written(consumer), kWarpgroup + kWarp);
    // All products are done here once: ptxas does not follow groups from one pass of a loop to the next.
    wgmma_wait<0>(scores);
    kept = kept_next;
  } while (s.more());
  write_rows<T, D>(dk, a.scale, a.dk, batch, kv_head, first_key, schedule.keys);
  write_rows<T, D>(dv, kModified ? m.keep_scale : 1.0f, a.dv, batch, kv_head, first_key, schedule.keys);
}

template <class T, int D, bool kModified>
__global__ void __launch_bounds__(TileShape<D>::kThreads, 1)
    attention_backward_tiles(const __grid_constant__ Arguments a) {
  using Tiles = TileShape<D>;
  const Room<D> room{shared_memory()};
  if (threadIdx.x == 0) {
    mbarrier_init(room.keys_full(), 1);
    for (int stage = 0; stage < Tiles::kStages; ++stage) {
      mbarrier_init(room.q_full(stage), 1), mbarrier_init(room.dout_full(stage), 1);
      mbarrier_init(room.empty(stage), Tiles::kConsumers * 4);  // warps
    }
    mbarrier_init_fence();
  }
  __syncthreads();
  const Schedule::Place place = a.schedule.place_of(static_cast<int>(blockIdx.x));
  const int role = warpgroup();
  if (role == 0) {
    keep_registers<24>();
    if (warp() == 0) {
      if (lane() == 0) fetch_tiles<D>(a, room, place);
    } else if (warp() <= Tiles::kConsumers) {
      carry_dq<D>(a, room, place, warp() - 1);
    }
  } else {
    take_registers<240>();
    consume<T, D, kModified>(a, room, place, role - 1);
  }
}

}  // namespace gptcore::cuda::backward_sm90
