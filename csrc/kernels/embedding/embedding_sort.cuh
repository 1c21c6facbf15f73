// A stable sort of ids with their places, on the device: radix sort, least digit first (Knuth 5.2.5), every place
// computed and none drawn by an atomic.
#pragma once

#include "core/cuda/launch.cuh"
#include "kernels/embedding/embedding_plan.h"

namespace gptcore::cuda {

// One pass: ids and places from `keys`, `places` to `sorted_keys`, `sorted_places`. The first pass reads `ids`.
struct SortPass {
  const void* ids;  // null after the first pass
  bool long_ids;
  int64_t tokens, vocabulary;
  const int32_t *keys, *places;
  int32_t *sorted_keys, *sorted_places;
  int32_t* counts;  // (tiles, kDigits)
  int shift;
};

__device__ __forceinline__ int32_t key_at(const SortPass& a, int64_t n) {
  if (!a.ids) return a.keys[n];
  const int64_t id =
      a.long_ids ? static_cast<const int64_t*>(a.ids)[n] : static_cast<const int32_t*>(a.ids)[n];
  return static_cast<int32_t>(id < 0 || id >= a.vocabulary ? a.vocabulary : id);
}
__device__ __forceinline__ int digit_of(const SortPass& a, int32_t key) {
  return key >> a.shift & (kDigits - 1);
}
// A warp has ids that lie together, so that its rounds keep their order.
__device__ __forceinline__ int64_t place_of(int round) {
  return int64_t{blockIdx.x} * kSortTile + warp() * (kWarp * kSortRounds) + round * kWarp + lane();
}

// How many ids of each tile have each digit.
static __global__ void __launch_bounds__(kSortThreads) count_digits(const SortPass a) {
  int32_t* counts = shared_memory<int32_t>();
  counts[threadIdx.x] = 0;
  __syncthreads();
  for (int round = 0; round < kSortRounds; ++round) {
    const int64_t n = place_of(round);
    if (n < a.tokens) atomicAdd(&counts[digit_of(a, key_at(a, n))], 1);
  }
  __syncthreads();
  a.counts[int64_t{blockIdx.x} * kDigits + threadIdx.x] = counts[threadIdx.x];
}

// Lanes with the same digit as this one among those that have any.
__device__ __forceinline__ unsigned same_digit(int digit, bool any) {
  unsigned same = __ballot_sync(kFullMask, any);
#pragma unroll
  for (int bit = 0; bit < kDigitBits; ++bit) {
    const unsigned set = __ballot_sync(kFullMask, digit >> bit & 1);
    same &= digit >> bit & 1 ? set : ~set;
  }
  return same;
}

// The sum over all threads before this one, of a block of kSortThreads.
__device__ __forceinline__ int sum_before(int x, int* room) {
  int sum = x;
#pragma unroll
  for (int step = 1; step < kWarp; step *= 2) {
    const int before = __shfl_up_sync(kFullMask, sum, step);
    if (lane() >= step) sum += before;
  }
  if (lane() == kWarp - 1) room[warp()] = sum;
  __syncthreads();
  for (int w = 0; w < warp(); ++w) sum += room[w];
  return sum - x;
}

// Sends each id where it belongs: behind all of lower digits, behind those of its digit in the tiles and warps before.
static __global__ void __launch_bounds__(kSortThreads) place_ids(const SortPass a) {
  constexpr int kWarps = kSortThreads / kWarp;
  int32_t* seen = shared_memory<int32_t>();  // (kWarps, kDigits): of each digit so far, later where it begins
  int32_t* mine = seen + warp() * kDigits;
  for (int i = threadIdx.x; i < kWarps * kDigits; i += kSortThreads) seen[i] = 0;
  __syncthreads();
  int32_t keys[kSortRounds];
  int ranks[kSortRounds];  // among the warp's ids of the same digit
#pragma unroll
  for (int round = 0; round < kSortRounds; ++round) {
    const int64_t n = place_of(round);
    const bool any = n < a.tokens;
    keys[round] = any ? key_at(a, n) : 0;
    const int digit = digit_of(a, keys[round]);
    const unsigned same = same_digit(digit, any);
    const int before = __popc(same & ((1u << lane()) - 1));
    ranks[round] = mine[digit] + before;
    __syncwarp();
    if (any && before == 0) mine[digit] += __popc(same);
    __syncwarp();
  }
  const int digit = static_cast<int>(threadIdx.x);
  int all = 0, begin = 0;  // of this thread's digit: in all tiles, and in those before this one
  for (int64_t tile = 0; tile < gridDim.x; ++tile) {
    const int count = a.counts[tile * kDigits + digit];
    all += count;
    if (tile < blockIdx.x) begin += count;
  }
  begin += sum_before(all, seen + kWarps * kDigits);
  for (int w = 0; w < kWarps; ++w) {
    const int count = seen[w * kDigits + digit];
    seen[w * kDigits + digit] = begin;
    begin += count;
  }
  __syncthreads();
#pragma unroll
  for (int round = 0; round < kSortRounds; ++round) {
    const int64_t n = place_of(round);
    if (n >= a.tokens) continue;
    const int32_t to = mine[digit_of(a, keys[round])] + ranks[round];
    a.sorted_keys[to] = keys[round];
    a.sorted_places[to] = a.ids ? static_cast<int32_t>(n) : a.places[n];
  }
}

// Where each id's occurrences begin: the first place with it or a larger one. Of `vocabulary` + 1 ids, so that each ends
// where the next begins.
static __global__ void __launch_bounds__(kSortThreads)
    find_begins(const int32_t* keys, int64_t tokens, int64_t vocabulary, int32_t* begins) {
  const int64_t v = int64_t{blockIdx.x} * kSortThreads + threadIdx.x;
  if (v > vocabulary) return;
  int64_t low = 0, high = tokens;
  while (low < high) {
    const int64_t middle = (low + high) / 2;
    if (keys[middle] < v) {
      low = middle + 1;
    } else {
      high = middle;
    }
  }
  begins[v] = static_cast<int32_t>(low);
}

// int32 of scratch: two sets of keys and places, counts, begins.
inline int64_t sort_room(int64_t tokens, int64_t vocabulary) {
  return 4 * tokens + sort_plan(tokens, vocabulary).tiles * kDigits + vocabulary + 1;
}

struct SortedIds {
  const int32_t *keys, *places, *begins;
};

inline SortedIds sort_ids(const void* ids, bool long_ids, int64_t tokens, int64_t vocabulary, int32_t* room) {
  const SortPlan p = sort_plan(tokens, vocabulary);
  SortPass pass{ids,     long_ids, tokens,        vocabulary,        nullptr,
                nullptr, room,     room + tokens, room + 4 * tokens, 0};
  int32_t* other = room + 2 * tokens;
  const dim3 tiles(static_cast<unsigned>(p.tiles)), threads(kSortThreads);
  constexpr int64_t kRoom = (kSortThreads / kWarp * kDigits + kWarp) * sizeof(int32_t);
  for (int i = 0; i < p.passes; ++i, pass.shift += kDigitBits) {
    if (i > 0) {
      int32_t* next = other;
      other = pass.sorted_keys;
      pass.ids = nullptr, pass.keys = other, pass.places = other + tokens;
      pass.sorted_keys = next, pass.sorted_places = next + tokens;
    }
    launch<&count_digits>({tiles, threads, kDigits * sizeof(int32_t)}, pass);
    launch<&place_ids>({tiles, threads, kRoom}, pass);
  }
  int32_t* begins = pass.counts + p.tiles * kDigits;
  launch<&find_begins>({dim3(static_cast<unsigned>(vocabulary / kSortThreads + 1)), threads},
                       static_cast<const int32_t*>(pass.sorted_keys), tokens, vocabulary, begins);
  return {pass.sorted_keys, pass.sorted_places, begins};
}

}  // namespace gptcore::cuda
