// Attention's forward pass for sm_90. Three warpgroups: one loads, two multiply, each 64 of a tile's 128 queries.
//
//   loader     tiles one after the other: K of a block, Q, then V behind the K of the next block, into rings of stages
//   multiplier S' = Q K' of the next block and O += P V of this one run while the warpgroup before them
//              takes the softmax of its own; turns are passed so that one's products hide the other's exponentials
//
// Blocks of keys go from the last to the first, those with hidden keys first among causal ones.
#include "kernels/attention/attention_forward_sm90.cuh"

#include "core/cuda/pack.cuh"
#include "core/cuda/scratch.h"
#include "core/cuda/wgmma.cuh"
#include "kernels/attention/attention_cuda.h"
#include "kernels/attention/attention_forward_sm90_rows.cuh"

namespace gptcore::cuda {
namespace {

struct ForwardTask {
  TensorMap q, k, v;
  AttentionProblem p;
  ForwardTiles tiles;
  int* taken;  // tiles beyond each block's first that have been taken; null: each takes every gridDim.x-th
};

struct ForwardJob {
  AttentionSequence s;
  int first;       // query; -1: no more tiles
  int begin, end;  // blocks of keys
};

template <int kDim>
struct alignas(1024) ForwardShared {
  using Sizes = ForwardSizes<kDim>;
  unsigned char q[Sizes::kQueryBytes];
  unsigned char k[Sizes::kStages][Sizes::kKeyBytes], v[Sizes::kStages][Sizes::kKeyBytes];
  ForwardJob jobs[2];  // of this tile and the next, which arrive with Q
  uint64_t q_full, q_empty, k_full[Sizes::kStages], k_empty[Sizes::kStages];
  uint64_t v_full[Sizes::kStages], v_empty[Sizes::kStages];
};
template <int kDim>
constexpr bool kFitsShared = sizeof(ForwardShared<kDim>) <= 227 << 10;
static_assert(kFitsShared<64> && kFitsShared<96> && kFitsShared<128> && kFitsShared<192> && kFitsShared<256>);

constexpr int kMultiplierWarps = 8;

template <int kStages>
struct Ring {
  int stage = 0;
  unsigned parity = 0;

  __device__ void next() {
    if (++stage == kStages) stage = 0, parity ^= 1;
  }
};

// --- the loader ------------------------------------------------------------------------------------------------

template <int kDim>
__device__ ForwardJob forward_job(const ForwardTask& task, int i) {
  constexpr int kKeys = ForwardSizes<kDim>::kKeys;
  const ForwardTile tile = forward_tile_of(task.p, task.tiles, i);
  ForwardJob job{sequence_of(task.p, tile.index, tile.head), tile.first, 0, 0};
  if (job.first < job.s.queries) {
    const KeyRange seen = job.s.keys_of_queries(job.first, min(job.first + kForwardQueries, job.s.queries));
    if (!seen.empty()) job.begin = seen.begin / kKeys, job.end = (seen.end + kKeys - 1) / kKeys;
  }
  return job;
}

// A tile's panels, of kTokens tokens each. One thread's business.
template <int kDim, int kTokens>
__device__ void load_tokens(unsigned char* to, const TensorMap& map, uint64_t* full, BoxPlace place,
                            int head) {
  constexpr int kColumns = ForwardSizes<kDim>::kColumns;
  mbarrier_arrive_expecting(full, kTokens * kColumns * 2);
#pragma unroll
  for (int c = 0; c < kColumns; c += kPanelColumns)
    tma_load(to + c * 2 * kTokens, map, full, c, place.token, head, place.sequence);
}

template <int kDim>
__device__ void load_tiles(const ForwardTask& task, ForwardShared<kDim>& shared) {
  using Sizes = ForwardSizes<kDim>;
  const bool leader = lane() == 0, packed = task.p.cu_q != nullptr;
  Ring<Sizes::kStages> k_ring, v_ring;
  unsigned tiles = 0;
  const auto load = [&](auto& ring, auto& buffers, uint64_t* full, uint64_t* empty, const TensorMap& map,
                        const AttentionSequence& s, int block) {
    mbarrier_wait(empty + ring.stage, ring.parity ^ 1);
    if (leader) {
      load_tokens<kDim, Sizes::kKeys>(
          buffers[ring.stage], map, full + ring.stage,
          box_place(packed, s.index, s.k_begin, s.keys, block * Sizes::kKeys, Sizes::kKeys), s.kv_head);
    }
    ring.next();
  };
  const auto publish = [&](const ForwardJob& job) {  // once the tile before is done with Q
    mbarrier_wait(&shared.q_empty, (tiles & 1) ^ 1);
    if (leader) shared.jobs[tiles & 1] = job;
    ++tiles;
  };
  for (int i = static_cast<int>(blockIdx.x); i < task.tiles.count;) {
    int next = i + static_cast<int>(gridDim.x);
    if (task.taken && leader) next = static_cast<int>(gridDim.x) + atomicAdd(task.taken, 1);
    const ForwardJob job = forward_job<kDim>(task, i);
    if (job.first < job.s.queries) {  // tiles behind a document's end are nobody's
      const auto load_k = [&](int block) {
        load(k_ring, shared.k, shared.k_full, shared.k_empty, task.k, job.s, block);
      };
      if (job.begin < job.end) load_k(job.end - 1);
      publish(job);
      if (leader) {
        load_tokens<kDim, kForwardQueries>(
            shared.q, task.q, &shared.q_full,
            box_place(packed, job.s.index, job.s.q_begin, job.s.queries, job.first, kForwardQueries),
            job.s.head);
      }
      for (int block = job.end - 1; block >= job.begin; --block) {
        if (block > job.begin) load_k(block - 1);
        load(v_ring, shared.v, shared.v_full, shared.v_empty, task.v, job.s, block);
      }
    }
    i = __shfl_sync(kFullMask, next, 0);
  }
  ForwardJob last{};
  last.first = -1;
  publish(last);
  if (leader) mbarrier_arrive(&shared.q_full);
}

// --- the multipliers -------------------------------------------------------------------------------------------

template <class T, int kDim, bool kPlain>
__device__ void multiply_tiles(const ForwardTask& task, ForwardShared<kDim>& shared) {
  using Sizes = ForwardSizes<kDim>;
  constexpr int kKeys = Sizes::kKeys;
  constexpr bool kTurns = kDim <= 128;  // where O leaves room, the other's softmax is long enough to hide in
  const int group = warpgroup() - 1;
  const int row = kForwardQueries / 2 * group + warp() % 4 * 16 + (lane() >> 2);  // of the tile
  const uint64_t q = k_major_operand<128>(shared.q) + k_major_rows<128>(kForwardQueries / 2 * group);
  Ring<Sizes::kStages> k_ring, v_ring;
  const auto release = [](uint64_t* empty) {  // this warp's products are done
    if (lane() == 0) mbarrier_arrive(empty);
  };
  if (kTurns && group == 0) named_barrier_arrive(1, 2 * kWarpgroup);  // the first turn is its own
  for (unsigned tiles = 0;; ++tiles) {
    mbarrier_wait(&shared.q_full, tiles & 1);
    const ForwardJob& job = shared.jobs[tiles & 1];
    if (job.first < 0) return;
    const AttentionProblem& p = task.p;
    const int query = job.first + row, begin = job.begin, end = job.end;
    // Blocks of keys that all of the warpgroup's queries see.
    const int first = job.first + kForwardQueries / 2 * group,
              last = min(first + kForwardQueries / 2, job.s.queries) - 1;
    const int plain_begin = (job.s.keys_of(last).begin + kKeys - 1) / kKeys,
              plain_end = job.s.keys_of(first).end / kKeys;
    const ForwardModifiers modifiers(p, job.s);
    const DropoutBits bits(p, job.s);
    const float factor = kPlain ? modifiers.factor : 1.0f;
    ForwardRows rows{{-INFINITY, -INFINITY}, {0.0f, 0.0f}};
    bool moved = false;  // a row's shift, which O has yet to follow
    float o[kDim / 2], s[kKeys / 2], shrink[2];
    uint32_t probabilities[kKeys / 16][4], words[kKeys / 16][4];
    const bool drops = !kPlain && p.keep < kKeepAll;

    const auto begin_scores = [&] {
      mbarrier_wait(shared.k_full + k_ring.stage, k_ring.parity);
      const uint64_t k = k_major_operand<128>(shared.k[k_ring.stage]);
      wgmma_fence(s);
#pragma unroll
      for (int i = 0; i < kDim / 16; ++i) {
        wgmma<kKeys, T, Major::k, Major::k>(s, q + k_major_step<128, kForwardQueries>(i),
                                            k + k_major_step<128, kKeys>(i), i > 0);
      }
      wgmma_commit();
    };
    const auto begin_values = [&](bool add) {
      mbarrier_wait(shared.v_full + v_ring.stage, v_ring.parity);
      const uint64_t v = mn_major_operand<128, kKeys>(shared.v[v_ring.stage]);
      wgmma_fence(o);
#pragma unroll
      for (int i = 0; i < kKeys / 16; ++i)
        wgmma<kDim, T, Major::mn>(o, probabilities[i], v + mn_major_step<128>(i), add || i > 0);
      wgmma_commit();
    };
    const auto end_scores = [&](int block) {  // K is free, and after the last block so is Q
      release(shared.k_empty + k_ring.stage);
      if (block == begin) release(&shared.q_empty);
      k_ring.next();
    };
    const auto soften_block = [&](int block) {
      const int key = block * kKeys + 2 * (lane() & 3);
      if constexpr (!kPlain) {
        const float ahead = static_cast<float>(job.s.place_of(query) - key);
        modifiers.apply(s, {ahead, ahead + 8.0f});
      }
      if (block < plain_begin || block >= plain_end) {
        const RowMask masks[2] = {job.s.mask_of(query), job.s.mask_of(query + 8)};
#pragma unroll
        for (int i = 0; i < kKeys / 2; ++i) {
          if (!masks[i / 2 % 2].sees(key + i / 4 * 8 + i % 2)) s[i] = -INFINITY;
        }
      }
      moved = soften(s, factor, rows, shrink);
      if (drops) drop(s, words, p.keep);
    };
    const auto pack = [&] {
#pragma unroll
      for (int i = 0; i < kKeys / 2; i += 2) probabilities[i / 8][i / 2 % 4] = pack_pair<T>(s[i], s[i + 1]);
    };

    if (begin < end) {
      begin_scores();
      if (drops) draw(words, bits, query, (end - 1) * kKeys);
      wgmma_wait<0>(s);
      end_scores(end - 1);
      soften_block(end - 1);
      pack();
    } else {
      release(&shared.q_empty);
    }
    for (int block = end - 2; block >= begin; --block) {
      if (kTurns) named_barrier(1 + group, 2 * kWarpgroup);
      begin_scores();
      begin_values(block < end - 2);
      if (kTurns) named_barrier_arrive(2 - group, 2 * kWarpgroup);
      if (drops) draw(words, bits, query, block * kKeys);
      wgmma_wait<1>(s);
      end_scores(block);
      soften_block(block);
      wgmma_wait<0>(o);
      release(shared.v_empty + v_ring.stage);
      v_ring.next();
      if (moved) {
#pragma unroll
        for (int i = 0; i < kDim / 2; ++i) o[i] *= shrink[i / 2 % 2];
      }
      pack();
    }
    if (begin < end) {
      begin_values(begin < end - 1);
      wgmma_wait<0>(o);
      release(shared.v_empty + v_ring.stage);
      v_ring.next();
    }
    store_rows<T, kDim>(p, job.s, query, o, rows);
  }
}

template <class T, int kDim, bool kPlain>
__global__ void __launch_bounds__(kForwardThreads, 1)
    forward_sm90_kernel(const __grid_constant__ ForwardTask task) {
  auto& shared = *shared_memory<ForwardShared<kDim>>();
  if (threadIdx.x == 0) {
    mbarrier_init(&shared.q_full, 1), mbarrier_init(&shared.q_empty, kMultiplierWarps);
    for (int i = 0; i < ForwardSizes<kDim>::kStages; ++i) {
      mbarrier_init(shared.k_full + i, 1), mbarrier_init(shared.k_empty + i, kMultiplierWarps);
      mbarrier_init(shared.v_full + i, 1), mbarrier_init(shared.v_empty + i, kMultiplierWarps);
    }
    mbarrier_init_fence();
    prefetch(task.q), prefetch(task.k), prefetch(task.v);
  }
  __syncthreads();
  if (warpgroup() == 0) {
    keep_registers<24>();
    if (warp() == 0) load_tiles<kDim>(task, shared);
  } else {
    take_registers<240>();
    multiply_tiles<T, kDim, kPlain>(task, shared);
  }
}

// --- the launcher ----------------------------------------------------------------------------------------------

template <class T, int kDim, bool kPlain>
void forward(const AttentionProblem& p) {
  constexpr int kKeys = ForwardSizes<kDim>::kKeys;
  const DType dtype = dtype_of<T>();
  ForwardTask task{tensor_map(query_boxes(p.q, dtype, p, kForwardQueries)),
                   tensor_map(key_boxes(p.k, dtype, p, kKeys)),
                   tensor_map(key_boxes(p.v, dtype, p, kKeys)),
                   p,
                   forward_tiles(p),
                   nullptr};
  const int blocks = std::min(task.tiles.count, limits().multiprocessors);
  const bool equal = !p.cu_q && p.left < 0 && p.right < 0;
  const DeviceScratch taken(equal || blocks == task.tiles.count ? 0 : sizeof(int));
  task.taken = taken.as<int>();
  if (task.taken) set_bytes(task.taken, 0, sizeof(int));
  launch<&forward_sm90_kernel<T, kDim, kPlain>>(
      {dim3(static_cast<unsigned>(blocks)), dim3(kForwardThreads), sizeof(ForwardShared<kDim>)}, task);
}

template <class T, int kDim>
void forward(const AttentionProblem& p) {
  const bool plain = p.soft_cap == 0.0f && !p.slopes && p.keep == kKeepAll && p.scale > 0.0f;
  plain ? forward<T, kDim, true>(p) : forward<T, kDim, false>(p);
}

}  // namespace

template <class T>
bool attention_forward_sm90_takes(const AttentionProblem& p) {
  if (limits().arch != 90 || p.mask.data || p.bias.data || p.stride) return false;
  if (p.batch < 1 || p.queries < 1 || p.keys < 1 || p.queries > kMaxTokens || p.keys > kMaxTokens)
    return false;
  const int64_t tiles = attention_tiles(p.cu_q, p.total_q, p.batch, p.queries, kForwardQueries);
  if (tiles * p.heads > kMaxTokens) return false;
  if (!can_pack<T>(p.out.data, p.out.token) || !can_pack<T>(p.out.data, p.out.head | p.out.batch))
    return false;
  const auto fit = [](const TensorBoxes& b) { return !unfit_for_tensor_map(b); };
  return p.head_dim % 8 == 0 && fit(query_boxes(p.q, dtype_of<T>(), p, kForwardQueries)) &&
         fit(key_boxes(p.k, dtype_of<T>(), p, kForwardQueries)) &&
         fit(key_boxes(p.v, dtype_of<T>(), p, kForwardQueries));
}

template <class T>
void attention_forward_sm90(const AttentionProblem& p) {
  if (p.head_dim > 192) return forward<T, 256>(p);
  if (p.head_dim > 128) return forward<T, 192>(p);
  if (p.head_dim > 96) return forward<T, 128>(p);
  p.head_dim > 64 ? forward<T, 96>(p) : forward<T, 64>(p);
}

template bool attention_forward_sm90_takes<bf16>(const AttentionProblem&);
template bool attention_forward_sm90_takes<f16>(const AttentionProblem&);
template void attention_forward_sm90<bf16>(const AttentionProblem&);
template void attention_forward_sm90<f16>(const AttentionProblem&);

}  // namespace gptcore::cuda
