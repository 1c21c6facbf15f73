// Attention of few queries over many keys, as in decoding: limited by how fast keys and values come from memory.
//
// The rows of a block are the queries of all heads that share a key head, 16 of them; each of its four warps takes 16 of
// the 64 keys of a tile and a softmax of its own. Keys are split over blocks (as in Flash-Decoding, Dao et al. 2023), by
// their number alone, so that results do not depend on the device or the batch; a second kernel joins the parts in order.
//
// Packed documents have rows of their own, a block those of one document; how many there are, blocks find out. Keys lie
// one after the other, or in pages (Kwon et al. 2023): then the pages of the next tile's keys are looked up
// while this one's are multiplied.
#pragma once

#include "core/cuda/launch.cuh"
#include "core/cuda/scratch.h"
#include "kernels/attention/attention_cuda.h"
#include "kernels/attention/attention_decode_plan.h"
#include "kernels/attention/attention_products.cuh"
#include "kernels/attention/attention_scores.cuh"
#include "kernels/attention/attention_softmax.cuh"
#include "kernels/attention/attention_tile_copy.cuh"

namespace gptcore::cuda {

// What the first kernel leaves for the second: of row i and part j, at (i parts + j), an output of head_dim and lse in
// powers of two. Rows count the queries of a batch, key head by key head.
struct DecodeParts {
  float *out, *lse;
};

// Where a key lies: its page, and its place in it.
struct KeyPlace {
  int page, within;
};

template <class T, int kDim, bool kPaged>
struct DecodeBlock {
  static constexpr int kRows = kDecodeRows, kKeys = kDecodeKeys, kOwnKeys = kKeys / kDecodeWarps;
  static constexpr int kColumns = decode_columns(kDim, sizeof(T));
  static constexpr int kThreads = kDecodeWarps * kWarp;
  static constexpr int kRowBytes = kDim * static_cast<int>(sizeof(T));  // of a query or key
  static constexpr int kValueBytes = kColumns * static_cast<int>(sizeof(T));
  static constexpr int64_t kPlaces = decode_shared_bytes(kDim, sizeof(T), false);
  using Sums = float[1][kColumns / 8][4];

  const AttentionProblem& p;
  const DecodePlan& plan;
  const AttentionSequence& s;
  const int first, column;  // row; element of the values
  unsigned char *const q_tile, *const k_tile, *const v_tile;
  KeyPlace* const places;  // of two tiles' keys

  __device__ DecodeBlock(const AttentionProblem& p, const DecodePlan& plan, const AttentionSequence& s,
                         int first, int column)
      : p(p),
        plan(plan),
        s(s),
        first(first),
        column(column),
        q_tile(shared_memory()),
        k_tile(q_tile + kRows * kRowBytes),
        v_tile(k_tile + kKeys * kRowBytes),
        places(reinterpret_cast<KeyPlace*>(q_tile + kPlaces)) {}

  __device__ int rows() const { return s.queries * plan.group; }
  __device__ int query_of(int row) const { return (first + row) / plan.group; }
  __device__ int head_of(int row) const { return s.head + (first + row) % plan.group; }

  __device__ __forceinline__ void copy_queries() const {
    const T* base = query_rows<const T>(p.q, s);
    copy_rows<T, kRowBytes, kRows, kThreads>(
        q_tile,
        [&](int row) { return base + query_of(row) * p.q.token + (first + row) % plan.group * p.q.head; },
        base, rows() - first, static_cast<int>(p.head_dim), plan.aligned);
  }
  // Keys or values, kBytes of each, of the tile at `key`.
  template <int kBytes>
  __device__ __forceinline__ void copy_keys(unsigned char* tile, const AttentionTensor& t, int key, int end,
                                            int column, const KeyPlace* at) const {
    const int width = static_cast<int>(p.head_dim) - column;
    if constexpr (kPaged) {
      const T* base = static_cast<const T*>(t.data) + s.kv_head * t.head + column;
      copy_rows<T, kBytes, kKeys, kThreads>(
          tile, [&](int row) { return base + at[row].page * t.batch + at[row].within * t.token; }, base,
          end - key, width, plan.aligned);
    } else {
      copy_tile<T, kBytes, kKeys, kThreads>(tile, key_rows<const T>(t, s) + key * t.token + column, t.token,
                                            end - key, width, plan.aligned);
    }
  }
  // That of a key by the table, of which no entry leads beyond the pages there are.
  __device__ __forceinline__ KeyPlace place_of_key(int key, int end) const {
    if (key >= end) return {0, 0};
    const int size = static_cast<int>(p.pages.size), block = key / size;
    const int64_t page = p.pages.table[s.index * p.pages.row + block];
    const int64_t most = p.pages.count - 1;
    return {static_cast<int>(page < 0 ? 0 : page > most ? most : page), key - block * size};
  }

  // Raw products of this warp's keys, from `key` on, to what the softmax takes.
  __device__ __forceinline__ void finish_scores(const ScoreTerms<T>& terms, int key, int end,
                                                float (&x)[1][kOwnKeys / 8][4]) const {
    float (&flat)[kOwnKeys / 2] = reinterpret_cast<float (&)[kOwnKeys / 2]>(x);
    const int g = lane() / 4;
    const auto key_of = [&](int i) { return key + 8 * (i / 4) + 2 * (lane() % 4) + i % 2; };
    if (plan.modified) {
      const ScoreRow rows[2] = {terms.row(query_of(g), head_of(g)),
                                terms.row(query_of(g + 8), head_of(g + 8))};
      terms.modify(flat, [&](int i) -> const ScoreRow& { return rows[i / 2 % 2]; }, key_of);
    }
    if (key + kOwnKeys <= end && s.all_seen(0, s.queries, key, key + kOwnKeys)) return;
    RowMask masks[2] = {s.mask_of(query_of(g)), s.mask_of(query_of(g + 8))};
    masks[0].end = min(masks[0].end, end), masks[1].end = min(masks[1].end, end);
    hide_unseen(flat, 0, [&](int i) -> const RowMask& { return masks[i / 2 % 2]; }, key_of);
  }

  // Joins what the warps have found, in their order, into the block's part.
  __device__ __forceinline__ void write(OnlineSoftmax<1>& softmax, const Sums& o, int64_t part_row, int part,
                                        const DecodeParts& parts) const {
    softmax.finish();
    float* sums = reinterpret_cast<float*>(k_tile);    // [warp][row][element], over both tiles
    float* states = reinterpret_cast<float*>(q_tile);  // [warp][row], shift and sum
    __syncthreads();                                   // all have done with the tiles
    const int g = lane() / 4, t = lane() % 4;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int at = warp() * kRows + g + 8 * i;
      if (t == 0) states[2 * at] = softmax.shift[0][i], states[2 * at + 1] = softmax.sum[0][i];
#pragma unroll
      for (int n = 0; n < kColumns / 8; ++n)
        *reinterpret_cast<float2*>(sums + at * kColumns + 8 * n + 2 * t) =
            make_float2(o[0][n][2 * i], o[0][n][2 * i + 1]);
    }
    __syncthreads();
    for (int i = static_cast<int>(threadIdx.x); i < kRows * kColumns; i += kThreads) {
      const int row = i / kColumns, d = i % kColumns;
      if (first + row >= rows() || column + d >= p.head_dim) continue;
      float top = -INFINITY, sum = 0.0f, value = 0.0f;
      for (int w = 0; w < kDecodeWarps; ++w) top = fmaxf(top, states[2 * (w * kRows + row)]);
      const float shift = top == -INFINITY ? 0.0f : top;
      for (int w = 0; w < kDecodeWarps; ++w) {
        const float weight = exp2_approximate(states[2 * (w * kRows + row)] - shift);
        const float part_sum = states[2 * (w * kRows + row) + 1];
        if (part_sum == 0.0f) continue;  // nothing seen: what lies in its output may come from nowhere
        // A warp that has met nothing but NaN has no shift.
        const float by = top == -INFINITY ? 1.0f : weight;
        sum += by * part_sum, value += by * sums[(w * kRows + row) * kColumns + d];
      }
      const int64_t at = (part_row + row) * plan.parts + part;
      parts.out[at * p.head_dim + column + d] = sum == 0.0f ? 0.0f : value / sum;
      if (column + d == 0) parts.lse[at] = sum == 0.0f ? -INFINITY : shift + log2f(sum);
    }
  }

  __device__ __forceinline__ void run(const KeySplit& split, int64_t part_row, int part,
                                      const DecodeParts& parts) const {
    const ScoreTerms<T> terms(p, s);
    const float factor = plan.modified ? 1.0f : terms.factor();
    const int own = warp() * kOwnKeys, thread = static_cast<int>(threadIdx.x);
    const bool looks_up = kPaged && thread < kKeys;
    const KeyRange seen = s.keys_of_queries(query_of(0), min(query_of(kRows - 1) + 1, s.queries));
    int key = split.begin + part * split.part_keys;
    const int end = min(min(key + split.part_keys, s.keys), seen.end);
    if (seen.begin > key) key += (seen.begin - key) / kKeys * kKeys;
    OnlineSoftmax<1> softmax;
    softmax.start(-INFINITY);
    Sums o = {};
    KeyPlace *now = places, *next = places + kKeys;
    if (key < end) {
      if (looks_up) now[thread] = place_of_key(key + thread, end);
      if (kPaged) __syncthreads();
      copy_queries();
      copy_keys<kRowBytes>(k_tile, p.k, key, end, 0, now);
      copy_async_commit();
    }
    for (; key < end; key += kKeys) {
      copy_async_wait<0>();
      __syncthreads();  // the keys are here, and the values before them done with
      copy_keys<kValueBytes>(v_tile, p.v, key, end, column, now);
      copy_async_commit();
      KeyPlace place;  // on its way during the products
      if (looks_up) place = place_of_key(key + kKeys + thread, end);
      float x[1][kOwnKeys / 8][4];
      AttentionProducts<T, kDim>::template scores<1, kOwnKeys>(q_tile, 0, k_tile + own * kRowBytes, x);
      if (looks_up) next[thread] = place;
      copy_async_wait<0>();
      __syncthreads();  // the values are here, and the keys done with
      if (key + kKeys < end) copy_keys<kRowBytes>(k_tile, p.k, key + kKeys, end, 0, next);
      copy_async_commit();
      finish_scores(terms, key + own, end, x);
      softmax.step(x, factor, o);
      AttentionProducts<T, kColumns>::template values<1, kOwnKeys>(x, v_tile + own * kValueBytes, o);
      if (kPaged) {
        KeyPlace* const done = now;
        now = next, next = done;
      }
    }
    write(softmax, o, part_row, part, parts);
  }
};

// As sequence_of, keys in pages included.
__device__ inline AttentionSequence decode_sequence(const AttentionProblem& p, int index, int head) {
  AttentionSequence s = sequence_of(p, index, head);
  if (p.pages.table) s.keys = min(max(p.pages.lengths[index], 0), s.keys);
  return s;
}

template <class T, int kDim, bool kPaged>
__global__ void __launch_bounds__(kDecodeWarps* kWarp, 1)
    decode_parts(const __grid_constant__ AttentionProblem p, const __grid_constant__ DecodePlan plan,
                 const DecodeParts parts) {
  using Block = DecodeBlock<T, kDim, kPaged>;
  constexpr int kSlices = kDim / Block::kColumns;
  const int block = static_cast<int>(blockIdx.x), part = block % plan.parts, outer = block / plan.parts;
  const int column = outer % kSlices * Block::kColumns, rows = outer / kSlices;
  const int unit = rows / plan.row_blocks, kv_head = unit % static_cast<int>(p.kv_heads);
  TileOfBatch tile{unit / static_cast<int>(p.kv_heads), rows % plan.row_blocks * kDecodeRows};
  if (p.cu_q)
    tile = tile_of_batch(p.cu_q, p.batch, p.total_q, kDecodeRows, rows % plan.row_blocks, plan.group);
  const AttentionSequence s = decode_sequence(p, tile.index, kv_head * plan.group);
  const KeySplit split = split_keys(s.queries, s.keys, s.left, plan.max_parts);
  if (part >= split.parts || tile.first >= s.queries * plan.group) return;
  const int64_t row = int64_t{unit} * plan.rows + s.q_begin * plan.group + tile.first;
  Block(p, plan, s, tile.first, column).run(split, row, part, parts);
}

// The document of a packed token: the last that has begun. All lanes of a warp come.
__device__ inline int document_of(const AttentionProblem& p, int token) {
  int low = 0, high = static_cast<int>(p.batch);  // it is one of [low, high)
  while (high - low > 1) {
    const int step = (high - low + kWarp - 1) / kWarp, probe = low + lane() * step;
    const bool begun = probe < high && p.cu_q[probe] <= token;
    low += (max(__popc(__ballot_sync(kFullMask, begun)), 1) - 1) * step;
    high = min(low + step, high);
  }
  return low;
}

// One block a row.
template <class T>
__global__ void __launch_bounds__(kJoinThreads)
    join_parts(const __grid_constant__ AttentionProblem p, const __grid_constant__ DecodePlan plan,
               const DecodeParts parts) {
  const int64_t row = blockIdx.x, unit = row / plan.rows;
  const int kv_heads = static_cast<int>(p.kv_heads), within = static_cast<int>(row % plan.rows);
  const int head = static_cast<int>(unit % kv_heads) * plan.group + within % plan.group,
            token = within / plan.group;
  const int index = p.cu_q ? document_of(p, token) : static_cast<int>(unit / kv_heads);
  const AttentionSequence s = decode_sequence(p, index, head);
  const int query = token - static_cast<int>(s.q_begin);
  const int count = split_keys(s.queries, s.keys, s.left, plan.max_parts).parts;
  const float* lse = parts.lse + row * plan.parts;
  const float sink = p.sinks ? p.sinks[head] * kLog2e : -INFINITY;
  float top = sink, sum = 0.0f;
  for (int j = 0; j < count; ++j) top = fmaxf(top, lse[j]);
  const float shift = top == -INFINITY ? 0.0f : top;
  for (int j = 0; j < count; ++j) sum += exp2f(lse[j] - shift);
  sum += exp2f(sink - shift);
  const float inverse = sum == 0.0f ? 0.0f : 1.0f / sum;
  T* out = query_rows<T>(p.out, s) + query * p.out.token;
  for (int d = static_cast<int>(threadIdx.x); d < p.head_dim; d += kJoinThreads) {
    float value = 0.0f;
    for (int j = 0; j < count; ++j)
      value += exp2f(lse[j] - shift) * parts.out[(row * plan.parts + j) * p.head_dim + d];
    out[d] = from_float<T>(value * inverse);
  }
  if (p.lse && threadIdx.x == 0)
    lse_rows(p.lse, p, s)[query] = sum == 0.0f ? -INFINITY : shift * kLn2 + logf(sum);
}

template <class T, int kDim, bool kPaged>
void launch_decode(const AttentionProblem& p, const DecodePlan& plan) {
  constexpr int64_t kBytes = sizeof(T);
  const int64_t units = p.kv_heads * (p.cu_q ? 1 : p.batch), rows = units * plan.rows;
  const DeviceScratch scratch(rows * plan.parts * (p.head_dim + 1) * static_cast<int64_t>(sizeof(float)));
  const DecodeParts parts{scratch.as<float>(), scratch.as<float>() + rows * plan.parts * p.head_dim};
  const int64_t blocks = units * plan.row_blocks * (kDim / decode_columns(kDim, kBytes)) * plan.parts;
  launch<&decode_parts<T, kDim, kPaged>>({dim3(static_cast<unsigned>(blocks)), dim3(kDecodeWarps * kWarp),
                                          decode_shared_bytes(kDim, kBytes, kPaged)},
                                         p, plan, parts);
  launch<&join_parts<T>>({dim3(static_cast<unsigned>(rows)), dim3(kJoinThreads)}, p, plan, parts);
}

template <class T, bool kPaged>
void decode(const AttentionProblem& p) {
  DecodePlan plan = decode_plan(p);
  plan.aligned = has_aligned_rows(p.q, sizeof(T)) && has_aligned_rows(p.k, sizeof(T)) &&
                 has_aligned_rows(p.v, sizeof(T));
  if (p.head_dim <= 64) return launch_decode<T, 64, kPaged>(p, plan);
  if (p.head_dim <= 128) return launch_decode<T, 128, kPaged>(p, plan);
  launch_decode<T, 256, kPaged>(p, plan);
}

}  // namespace gptcore::cuda
