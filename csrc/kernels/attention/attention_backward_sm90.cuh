// The kernel of attention's backward for sm_90. A block keeps 128 keys and values and goes over tiles of queries:
//
//   S' = K Q'   dP' = V dO'     (keys by queries) by wgmma into registers
//   P' = exp2(S' - lse)   dS' = P' (dP' - delta)
//   dV += P' dO   dK += dS' Q   P' and dS' from registers, where they already lie as wgmma's first operand
//   dQ = dS K                   dS from shared memory, with all 128 keys
//
// Warpgroup 0 moves data: one thread fetches tiles, two others add the dQ of each consumer to global memory, in turn
// with other blocks. Warpgroups 1 and 2 compute, with 64 keys each but for dQ, of which each takes
// 64 x 64 for all keys: columns where D is 128, queries where it is 64.
#pragma once

#include "kernels/attention/attention_backward_sm90_products.cuh"
#include "kernels/attention/attention_backward_sm90_scores.cuh"
#include "kernels/attention/attention_backward_sm90_transport.cuh"

namespace gptcore::cuda::backward_sm90 {

// 64 rows of dK or dV, those that exist.
template <class T, int D>
__device__ __forceinline__ void write_rows(const float (&sums)[D / 2], float scale, const AttentionTensor& to,
                                           const AttentionSequence& s, int first) {
  const int row = first + static_cast<int>(threadIdx.x) / kWarp % 4 * 16 + lane() / 4;
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    if (row + 8 * h >= s.keys) continue;
    T* out = key_rows<T>(to, s) + (row + 8 * h) * to.token + lane() % 4 * 2;
#pragma unroll
    for (int j = 0; j < D / 8; ++j) {
      *reinterpret_cast<uint32_t*>(out + 8 * j) =
          pack_pair<T>(sums[4 * j + 2 * h] * scale, sums[4 * j + 2 * h + 1] * scale);
    }
  }
}

template <class T, int D, bool kModified>
__device__ __forceinline__ void consume(const Arguments& a, const Room<D>& room, int consumer) {
  using Tiles = TileShape<D>;
  constexpr int kQueries = Tiles::kQueries;
  // Whether dP' waits for P', and dS' for dV: with D 64, where a tile takes 64 registers, modifiers leave no room else.
  constexpr bool kLate = kModified && D == 64;
  const AttentionProblem& problem = a.p;
  const Work& work = room.work();
  const auto first_key = [&] { return work.key_tile * Tiles::kKeys + consumer * 64; };
  float dk[D / 2] = {}, dv[D / 2] = {}, scores[kQueries / 2];
  Steps s(work);
  const auto draw = [&] {  // of the tile where s is
    const int head = static_cast<int>(problem.heads) * work.s.index + work.s.head + s.head;
    return draw_kept<kQueries, kModified>(problem, first_key(), s.tile * kQueries, head);
  };
  const auto write = [&](float dk_scale, float dv_scale) {
    write_rows<T, D>(dk, dk_scale, problem.dk, work.s, first_key());
    write_rows<T, D>(dv, dv_scale, problem.dv, work.s, first_key());
  };
  mbarrier_wait(room.keys_full(), 0);
  if (!s.more()) return write(0.0f, 0.0f);
  pin(dk), pin(dv);
  KeptElements<kQueries> kept = draw();
  mbarrier_wait(room.q_full(0), 0);
  multiply_rows<T, D>(scores, rows_operand<D>(room.k(), consumer), room.q(0));
  wgmma_wait<0>(scores);
  do {
    pin(consumer);  // registers are for sums
    const int stage = s.stage(), step = s.step, head = work.s.head + s.head;
    float factors[kQueries / 2], gradients[kQueries / 2], dq[32];
    uint32_t p[kQueries / 16][4], ds[kQueries / 16][4];
    const ScoreTile tile(work.s, first_key(), s.tile * kQueries, kQueries);
    const auto multiply_values = [&] {
      mbarrier_wait(room.dout_full(stage), s.parity());
      multiply_rows<T, D>(gradients, rows_operand<D>(room.v(), consumer), room.dout(stage));
    };
    if constexpr (!kLate) multiply_values();

    const float slope =
        kModified && problem.slopes
            ? problem.slopes[work.s.index * problem.slopes_batch + head * problem.slopes_head] * kLog2e
            : 0.0f;
    const float* lse = room.lse(stage) + lane() % 4 * 2;
    if (tile.whole) {
      Probabilities<T, kQueries, kModified, false>{problem, slope, tile, kept}.all(scores, lse, factors, p);
    } else {
      Probabilities<T, kQueries, kModified, true>{problem, slope, tile, kept}.all(scores, lse, factors, p);
    }
    add_products<T, D>(dv, p, room.dout(stage));

    if constexpr (kLate) {
      multiply_values();
      wgmma_wait<0>(gradients, dv);
      pin_all(p);
    } else {
      wgmma_wait<1>(gradients);
    }
    ScoreGradients<T, kQueries, kModified>{problem.keep_scale, kept}.all(
        factors, gradients, room.delta(stage) + lane() % 4 * 2, ds);
    store_gradients<kQueries>(ds, room.ds(step), consumer);
    add_products<T, D>(dk, ds, room.q(stage));
    async_proxy_fence();
    named_barrier(kGradientsWritten, Tiles::kConsumers * kWarpgroup);
    wgmma_wait<1>(dv);
    if constexpr (!kLate) pin_all(p);

    multiply_gradients<T, D>(dq, gradients_operand<D>(room.ds(step), consumer),
                             columns_operand<D>(room.k(), consumer));
    s.advance();
    // What does not need many registers, while they are few and products under way.
    const KeptElements<kQueries> kept_next = draw();
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
  write(problem.scale, kModified ? problem.keep_scale : 1.0f);
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
  if (warp() == 0) {
    const Work work = find_work<D>(a);
    if (lane() == 0) room.work() = work;
  }
  __syncthreads();
  if (room.work().key_tile < 0) return;
  const int role = warpgroup();
  if (role == 0) {
    keep_registers<24>();
    if (warp() == 0) {
      if (lane() == 0) fetch_tiles<D>(a, room);
    } else if (warp() <= Tiles::kConsumers) {
      carry_dq<D>(a, room, warp() - 1);
    }
  } else {
    take_registers<240>();
    consume<T, D, kModified>(a, room, role - 1);
  }
}

}  // namespace gptcore::cuda::backward_sm90
