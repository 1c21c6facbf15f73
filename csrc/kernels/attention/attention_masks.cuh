// Which keys a query sees, and which blocks of keys a block of queries visits, for CUDA's kernels: plain integer
// arithmetic, the same masks as mask_range.h and pattern.h. Rows are the queries of one head.
#pragma once

#include "core/cuda/launch.cuh"
#include "kernels/attention/attention_body.h"

namespace gptcore::cuda {

// Sequences are shorter, and bounds clamped to it, so that places and their sums are 32-bit.
constexpr int kMaxTokens = static_cast<int>(kMaxDeviceTokens);

struct KeyRange {
  int begin, end;
  __host__ __device__ bool empty() const { return end <= begin; }
};

// The keys that one query sees: those of [begin, end) from `near` on, or whose remainder by the pattern's stride lies
// in [low, high). Without a pattern near is begin.
struct RowMask {
  int begin, end, near, low, high;

  __host__ __device__ bool sees(int key) const { return key >= begin && key < end; }
  __host__ __device__ bool sees(int key, int remainder) const {
    return sees(key) && (key >= near || (remainder >= low && remainder < high));
  }
};

// One sequence (or packed document) and one query head of a problem.
struct AttentionSequence {
  int index, head, kv_head;  // in the batch, of the queries, of the keys
  int64_t q_begin, k_begin;  // first token, when packed
  int queries, keys;
  int left, right;      // -1: unbounded
  int prefix;           // keys that all queries see; above 0 only without a left bound
  int stride, summary;  // of the pattern; stride 0: none

  // The key at a query's own place: causal is aligned at the bottom right.
  __host__ __device__ int place_of(int query) const { return query + keys - queries; }

  __host__ __device__ KeyRange keys_of(int query) const {
    const int place = place_of(query);
    const int begin = left < 0 ? 0 : min(max(place - left, 0), keys);
    const int end = right < 0 ? keys : min(max(place + right + 1, 0), keys);
    return {begin, max(end, prefix)};
  }

  // What any query of [begin, end) sees at most.
  __host__ __device__ KeyRange keys_of_queries(int begin, int end) const {
    return {keys_of(begin).begin, keys_of(end - 1).end};
  }

  // The queries that see any key of [begin, end), at most.
  __host__ __device__ KeyRange queries_of_keys(int begin, int end) const {
    const int shift = keys - queries;
    const int first = right < 0 || begin < prefix ? 0 : max(begin - shift - right, 0);
    const int last = left < 0 ? queries : min(end - shift + left, queries);
    return {min(first, queries), max(last, 0)};
  }

  // Queries beyond the last see nothing.
  __host__ __device__ RowMask mask_of(int query) const {
    if (query >= queries) return {0, 0, 0, 0, 0};
    const KeyRange seen = keys_of(query);
    if (stride == 0) return {seen.begin, seen.end, seen.begin, 0, 0};
    const int place = max(place_of(query), 0);
    if (summary != 0) return {seen.begin, seen.end, place / stride * stride, stride - summary, stride};
    return {seen.begin, seen.end, place - stride, place % stride, place % stride + 1};
  }

  // Whether a query of [first, last) sees a key of [begin, end) within their ranges; may say yes where none does.
  __host__ __device__ bool visits(int first, int last, int begin, int end) const {
    if (stride == 0) return true;
    const int from = max(place_of(first), 0), to = max(place_of(min(last, queries) - 1), 0);
    if (begin > to) return false;
    end = min(end, to + 1);
    if (summary == 0) {
      const int nearest = max(from - end + 1, 0);
      return nearest <= stride || (to - begin) / stride * stride >= nearest;
    }
    const int to_summary = max(stride - summary - begin % stride, 0);
    return (end - 1) / stride >= from / stride || begin + to_summary < end;
  }

  // Whether every query of [first, last) that there is sees all keys of [begin, end): no test key by key then.
  __host__ __device__ bool all_seen(int first, int last, int begin, int end) const {
    if (stride != 0 || end > keys) return false;
    return keys_of(min(last, queries) - 1).begin <= begin && keys_of(first).end >= end;
  }
};

__host__ __device__ inline int attention_bound(int64_t bound) {
  return bound < 0 ? -1 : static_cast<int>(bound < kMaxTokens ? bound : kMaxTokens);
}

// Bounds that lie on the device are taken as they come, but never past the tensors.
__device__ inline AttentionSequence sequence_of(const AttentionProblem& p, int index, int head) {
  AttentionSequence s{};
  s.index = index, s.head = head;
  s.kv_head = head / static_cast<int>(p.heads / p.kv_heads);
  s.queries = static_cast<int>(p.queries), s.keys = static_cast<int>(p.keys);
  if (p.cu_q) {
    const int total_q = static_cast<int>(p.total_q), total_k = static_cast<int>(p.total_k);
    const int q = min(max(p.cu_q[index], 0), total_q), k = min(max(p.cu_k[index], 0), total_k);
    s.q_begin = q, s.queries = min(max(p.cu_q[index + 1], q), total_q) - q;
    s.k_begin = k, s.keys = min(max(p.cu_k[index + 1], k), total_k) - k;
  }
  s.left = attention_bound(p.left), s.right = attention_bound(p.right);
  s.prefix = p.prefix ? min(max(p.prefix[index], 0), s.keys) : 0;
  s.stride = static_cast<int>(p.stride < kMaxTokens ? p.stride : kMaxTokens);
  s.summary = static_cast<int>(p.summary < kMaxTokens ? p.summary : kMaxTokens);
  return s;
}

// The first row of a query-side tensor (q, out, dout, dq) or a key-side one (k, v, dk, dv) of one head and sequence.
template <class T>
__device__ __forceinline__ T* query_rows(const AttentionTensor& t, const AttentionSequence& s) {
  return static_cast<T*>(t.data) + s.index * t.batch + s.q_begin * t.token + s.head * t.head;
}
template <class T>
__device__ __forceinline__ T* key_rows(const AttentionTensor& t, const AttentionSequence& s) {
  return static_cast<T*>(t.data) + s.index * t.batch + s.k_begin * t.token + s.kv_head * t.head;
}
// lse of the first query, or of what has its shape; those of the next follow.
template <class T>
__device__ __forceinline__ T* lse_rows(T* data, const AttentionProblem& p, const AttentionSequence& s) {
  return data + s.index * p.lse_batch + s.q_begin + s.head * p.lse_head;
}

// --- blocks of tokens over a batch ------------------------------------------------------------------------------

// Tiles of `tile` tokens that a grid has for the sequences of a batch. The lengths of packed documents lie on the
// device: tile cu[i] / tile + i is the first of document i, which leaves each enough, and none more than one too many.
inline int64_t attention_tiles(const int32_t* cu, int64_t total, int64_t batch, int64_t length, int tile) {
  return cu ? total / tile + batch : batch * ((length + tile - 1) / tile);
}

// The number of a tile of queries and a head: tiles through all sequences, as many of each as attention_tiles() leaves
// it, and the heads of one number after each other. `nth`: in the sequence.
__device__ inline int64_t tile_and_head(const AttentionProblem& p, const AttentionSequence& s, int tile,
                                        int nth, int head) {
  const int first =
      p.cu_q ? static_cast<int>(s.q_begin) / tile + s.index : s.index * ((s.queries + tile - 1) / tile);
  return (first + int64_t{nth}) * p.heads + head;
}

struct TileOfBatch {
  int index, first;  // the sequence, and the tile's first token in it: beyond the last where the tile is idle
};

// What tile number `tile_index` is. `length` is `total` when packed. All lanes of a warp come. Later tiles of a
// sequence come first: causal makes them longer. Where a token of packed ones is `rows` rows, tiles are of rows.
__device__ inline TileOfBatch tile_of_batch(const int32_t* cu, int64_t batch, int64_t length, int tile,
                                            int tile_index, int rows = 1) {
  if (!cu) {
    const int tiles = static_cast<int>((length + tile - 1) / tile);
    return {tile_index / tiles, (tiles - 1 - tile_index % tiles) * tile};
  }
  const auto bound = [&](int i) { return min(max(cu[i], 0), static_cast<int>(length)) * rows; };
  int low = 0, high = static_cast<int>(batch);  // the document is one of [low, high)
  while (high - low > 1) {
    const int step = (high - low + kWarp - 1) / kWarp, probe = low + lane() * step;
    const bool begun = probe < high && bound(probe) / tile + probe <= tile_index;
    const int count = max(__popc(__ballot_sync(kFullMask, begun)), 1);
    low += (count - 1) * step;
    high = min(low + step, high);
  }
  const int nth = tile_index - (bound(low) / tile + low);
  const int needed = (max(bound(low + 1) - bound(low), 0) + tile - 1) / tile;
  return {low, (nth < needed ? needed - 1 - nth : needed) * tile};
}

}  // namespace gptcore::cuda
