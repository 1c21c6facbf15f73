// Places of choices: a segment is the choices of one order (all first ones, then all second ones, ...) of one chunk of
// tokens. Counted by expert, summed up over the segments in their order, and each choice's place is what the segments
// before have asked for and the choices before it in its own.
#pragma once

#include "core/cuda/launch.cuh"
#include "kernels/moe_router/moe_router_device.h"

namespace gptcore::cuda {

struct RouterScratch {
  int64_t chunk, chunks;
  float* top_probability;  // (N) of the first choice, where the priority is that
  int32_t* order;          // (N) tokens by priority; null: as they come
  float* probabilities;    // (chunks, E) sums
  float* losses;           // (chunks, 3): sums of lse^2, of entropies, and how many tokens count
  // (K + 1, chunks, E): choices that ask for a place, later how many ask before; the last set: second choices not kept
  int32_t* counts;
  double* balance;  // (E): each expert's part of the loss
};

__device__ __forceinline__ int64_t token_at(const RouterScratch& s, int64_t i) {
  return s.order ? s.order[i] : i;
}

// Whether a choice that is there asks for a place.
__device__ __forceinline__ bool is_kept(const MoeRouterDeviceForward& a, int64_t at, int64_t k) {
  return !(k == 1 && a.uniforms && a.rows[at] < 0);
}

// Counts of all segments of this block's chunk, `sets` of them at a time in room of sets * E. All threads come.
__device__ __forceinline__ void count_chunk(const MoeRouterDeviceForward& a, const RouterScratch& s,
                                            int* room, int sets) {
  const int experts = static_cast<int>(a.experts), all = static_cast<int>(a.choices) + 1;
  const int64_t first = blockIdx.x * s.chunk, left = a.tokens - first;
  const int64_t asks = (left < s.chunk ? left : s.chunk) * a.choices;
  for (int set = 0; set < all; set += sets) {
    const int count = sets < all - set ? sets : all - set;
    for (int i = static_cast<int>(threadIdx.x); i < count * experts; i += static_cast<int>(blockDim.x))
      room[i] = 0;
    __syncthreads();
    for (int64_t i = threadIdx.x; i < asks; i += blockDim.x) {
      const int64_t k = i % a.choices, at = token_at(s, first + i / a.choices) * a.choices + k;
      const int64_t its = (is_kept(a, at, k) ? k : a.choices) - set;
      const int expert = a.chosen[at];
      if (expert >= 0 && its >= 0 && its < count) atomicAdd(&room[its * experts + expert], 1);
    }
    __syncthreads();
    for (int i = static_cast<int>(threadIdx.x); i < count * experts; i += static_cast<int>(blockDim.x)) {
      s.counts[((set + i / experts) * s.chunks + blockIdx.x) * experts + i % experts] = room[i];
    }
    __syncthreads();
  }
}

constexpr int kCountThreads = 256, kCountSets = 8;

__global__ void __launch_bounds__(kCountThreads)
    count_in_order(const MoeRouterDeviceForward a, const RouterScratch s) {
  count_chunk(a, s, shared_memory<int>(), kCountSets);
}

// --- sums over segments ----------------------------------------------------------------------------------------

constexpr int kScanWarps = 16, kScanBatch = 8;

// What the warps of a block found for its 32 experts.
struct ScanRoom {
  double probabilities[kScanWarps][kWarp];
  int asked[kScanWarps][kWarp], first[kScanWarps][kWarp], not_kept[kScanWarps][kWarp];
  int tokens;
};

struct Range {
  int64_t begin, end;
};
// This warp's part of `count`.
__device__ __forceinline__ Range range_of_warp(int64_t count) {
  const int64_t part = (count + kScanWarps - 1) / kScanWarps, begin = warp() * part;
  return {begin < count ? begin : count, begin + part < count ? begin + part : count};
}

__device__ __forceinline__ void sum_segments(const MoeRouterDeviceForward& a, const RouterScratch& s,
                                             int64_t expert, ScanRoom* room) {
  int asked = 0, first = 0, not_kept = 0;
  double probability = 0.0;
  const Range segments = range_of_warp(a.choices * s.chunks), chunks = range_of_warp(s.chunks);
#pragma unroll 8
  for (int64_t i = segments.begin; i < segments.end; ++i) {
    const int count = s.counts[i * a.experts + expert];
    asked += count;
    first += i < s.chunks ? count : 0;
  }
#pragma unroll 8
  for (int64_t c = chunks.begin; c < chunks.end; ++c) {
    not_kept += s.counts[(a.choices * s.chunks + c) * a.experts + expert];
    probability += static_cast<double>(s.probabilities[c * a.experts + expert]);
  }
  room->asked[warp()][lane()] = asked, room->first[warp()][lane()] = first;
  room->not_kept[warp()][lane()] = not_kept, room->probabilities[warp()][lane()] = probability;
}

// Requests, share and loss of one expert; how many ask for it before each warp's segments.
__device__ __forceinline__ void sum_warps(const MoeRouterDeviceForward& a, const RouterScratch& s,
                                          int64_t expert, ScanRoom* room) {
  int asked = 0, first = 0, not_kept = 0;
  double probability = 0.0;
  for (int w = 0; w < kScanWarps; ++w) {
    const int count = room->asked[w][lane()];
    room->asked[w][lane()] = asked;
    asked += count, first += room->first[w][lane()], not_kept += room->not_kept[w][lane()];
    probability += room->probabilities[w][lane()];
  }
  if (expert >= a.experts) return;
  const double tokens = room->tokens > 0 ? room->tokens : 1;
  const float share = static_cast<float>((a.count_all ? asked + not_kept : first) / tokens);
  a.requested[expert] = asked;
  a.share[expert] = share;
  s.balance[expert] = static_cast<double>(share) * probability;
}

// A block for 32 experts: a lane each, every warp a range of segments.
__global__ void __launch_bounds__(kScanWarps* kWarp)
    scan_segments(const MoeRouterDeviceForward a, const RouterScratch s) {
  ScanRoom* room = shared_memory<ScanRoom>();
  const int64_t expert = static_cast<int64_t>(blockIdx.x) * kWarp + lane();
  const int64_t there = expert < a.experts ? expert : a.experts - 1;
  sum_segments(a, s, there, room);
  if (warp() == 0) {
    int tokens = 0;
    for (int64_t c = lane(); c < s.chunks; c += kWarp) tokens += static_cast<int>(s.losses[c * 3 + 2]);
    for (int step = kWarp / 2; step > 0; step /= 2) tokens += __shfl_xor_sync(kFullMask, tokens, step);
    if (lane() == 0) room->tokens = tokens;
  }
  __syncthreads();
  if (warp() == 0) sum_warps(a, s, expert, room);
  __syncthreads();
  if (expert >= a.experts) return;
  int before = room->asked[warp()][lane()];
  const Range segments = range_of_warp(a.choices * s.chunks);
  for (int64_t i = segments.begin; i < segments.end; i += kScanBatch) {
    int count[kScanBatch];  // read before any is written, so that the reads overlap
#pragma unroll
    for (int j = 0; j < kScanBatch; ++j) {
      count[j] = i + j < segments.end ? s.counts[(i + j) * a.experts + expert] : 0;
    }
#pragma unroll
    for (int j = 0; j < kScanBatch; ++j) {
      if (i + j < segments.end) s.counts[(i + j) * a.experts + expert] = before;
      before += count[j];
    }
  }
}

// --- rows ------------------------------------------------------------------------------------------------------

constexpr int kPlaceThreads = 128, kPlaceWarps = kPlaceThreads / kWarp;

// Where each expert's rows start, into shared memory, E + 1 of them; `sums` is room for one number a warp.
__device__ __forceinline__ void find_offsets(const MoeRouterDeviceForward& a, int* offsets, int* sums) {
  const int experts = static_cast<int>(a.experts), part = (experts + kPlaceThreads - 1) / kPlaceThreads;
  const int begin = static_cast<int>(threadIdx.x) * part,
            end = begin + part < experts ? begin + part : experts;
  const auto rows = [&](int e) {
    return a.requested[e] < a.capacity ? a.requested[e] : static_cast<int>(a.capacity);
  };
  int own = 0;
  for (int e = begin; e < end; ++e) own += rows(e);
  int before = own;
  for (int step = 1; step < kWarp; step *= 2) {
    const int from = __shfl_up_sync(kFullMask, before, static_cast<unsigned>(step));
    before += lane() >= step ? from : 0;
  }
  if (lane() == kWarp - 1) sums[warp()] = before;
  __syncthreads();
  before -= own;
  for (int w = 0; w < warp(); ++w) before += sums[w];
  if (threadIdx.x == 0) offsets[0] = 0;
  for (int e = begin; e < end; ++e) before += rows(e), offsets[e + 1] = before;
  __syncthreads();
}

// The rows of one segment's choices, 32 at a time in their order, by one warp.
__device__ __forceinline__ void place_segment(const MoeRouterDeviceForward& a, const RouterScratch& s,
                                              int64_t k, const int* offsets) {
  const int64_t chunk = blockIdx.x, first = chunk * s.chunk;
  const int64_t end = first + s.chunk < a.tokens ? first + s.chunk : a.tokens;
  int32_t* asked = s.counts + (k * s.chunks + chunk) * a.experts;
  for (int64_t i = first; i < end; i += kWarp) {
    const bool alive = i + lane() < end;
    const int64_t at = alive ? token_at(s, i + lane()) * a.choices + k : 0;
    const int expert = alive && is_kept(a, at, k) ? a.chosen[at] : -1;
    const unsigned same = __match_any_sync(kFullMask, expert);
    const int before = expert >= 0 ? asked[expert] : 0;
    const int place = before + __popc(same & ((1u << lane()) - 1u));
    const bool fits = expert >= 0 && place < a.capacity;
    if (alive) a.rows[at] = fits ? offsets[expert] + place : -1;
    if (alive && !fits) a.gates[at] = 0.0f;
    __syncwarp();
    if (expert >= 0 && __ffs(static_cast<int>(same)) == lane() + 1) asked[expert] = before + __popc(same);
    __syncwarp();
  }
}

// Offsets and losses, by the block behind those of the chunks.
__device__ __forceinline__ void write_totals(const MoeRouterDeviceForward& a, const RouterScratch& s,
                                             const int* offsets) {
  for (int64_t e = threadIdx.x; e <= a.experts; e += kPlaceThreads) a.offsets[e] = offsets[e];
  if (warp() != 0) return;
  double balance = 0.0, z = 0.0, entropy = 0.0, tokens = 0.0;
  for (int64_t e = lane(); e < a.experts; e += kWarp) balance += s.balance[e];
  for (int64_t c = lane(); c < s.chunks; c += kWarp) {
    z += static_cast<double>(s.losses[c * 3]), entropy += static_cast<double>(s.losses[c * 3 + 1]);
    tokens += static_cast<double>(s.losses[c * 3 + 2]);
  }
  for (int step = kWarp / 2; step > 0; step /= 2) {
    balance += __shfl_xor_sync(kFullMask, balance, step), z += __shfl_xor_sync(kFullMask, z, step);
    entropy += __shfl_xor_sync(kFullMask, entropy, step), tokens += __shfl_xor_sync(kFullMask, tokens, step);
  }
  if (lane() > 0) return;
  const double n = tokens > 0.0 ? tokens : 1.0;
  *a.balance_loss = static_cast<float>(static_cast<double>(a.experts) * balance / n);
  *a.z_loss = static_cast<float>(z / n);
  *a.entropy = static_cast<float>(entropy / n);
}

__global__ void __launch_bounds__(kPlaceThreads)
    place_choices(const MoeRouterDeviceForward a, const RouterScratch s) {
  int* sums = shared_memory<int>();
  int* offsets = sums + kPlaceWarps;
  find_offsets(a, offsets, sums);
  if (blockIdx.x == s.chunks) {
    write_totals(a, s, offsets);
  } else {
    for (int64_t k = warp(); k < a.choices; k += kPlaceWarps) place_segment(a, s, k, offsets);
  }
}

}  // namespace gptcore::cuda
