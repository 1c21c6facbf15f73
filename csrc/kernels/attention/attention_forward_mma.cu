// Attention's forward by mma.sync, from sm_80 on: every option, f32, tf32, bf16 and f16.
//
// A block takes one tile of queries of one head and walks over the tiles of keys that any of them sees, as in
// FlashAttention-2 (Dao 2023): keys and values come by asynchronous copies, each while the other is computed with,
// scores and probabilities stay in registers. Packed documents are found on the device.
#include <type_traits>

#include "core/cuda/launch.cuh"
#include "kernels/attention/attention_cuda.h"
#include "kernels/attention/attention_forward_tiles.h"
#include "kernels/attention/attention_products.cuh"
#include "kernels/attention/attention_scores.cuh"
#include "kernels/attention/attention_softmax.cuh"
#include "kernels/attention/attention_tile_copy.cuh"

namespace gptcore::cuda {
namespace {

struct ForwardPlan {
  int tiles;  // of queries: of a sequence, or when packed of all documents
  bool aligned_inputs, aligned_output;
  bool modified;  // the scores, by more than a scale above 0
};

// Where a block works. Blocks that follow each other share keys: those of a sequence's head, then of the next head.
__device__ __forceinline__ TileOfBatch block_tile(const AttentionProblem& p, const ForwardPlan& plan,
                                                  int rows, int* head) {
  const int block = static_cast<int>(blockIdx.x), outer = block / plan.tiles, tile = block % plan.tiles;
  const int heads = static_cast<int>(p.heads);
  *head = outer % heads;
  return tile_of_batch(p.cu_q, p.batch, p.queries, rows, outer / heads * plan.tiles + tile);
}

template <class T, int kDim, bool kPlain>
struct ForwardBlock {
  static constexpr ForwardShape kTile = forward_shape(sizeof(T), kDim, kPlain, std::is_same_v<T, tf32>);
  static constexpr int kRows = kTile.rows(), kKeys = kTile.keys, kRowTiles = kTile.row_tiles;
  static constexpr int kThreads = kTile.threads(), kRowBytes = kDim * static_cast<int>(sizeof(T));
  using Products = AttentionProducts<T, kDim>;
  using Scores = float[kRowTiles][kKeys / 8][4];
  using Sums = float[kRowTiles][kDim / 8][4];

  const AttentionProblem& p;
  const AttentionSequence& s;
  const ForwardPlan& plan;
  const int first, warp_row;  // the block's first query; the warp's first row
  unsigned char *const q_tile, *const k_tile, *const v_tile;

  __device__ ForwardBlock(const AttentionProblem& p, const AttentionSequence& s, const ForwardPlan& plan,
                          int first)
      : p(p),
        s(s),
        plan(plan),
        first(first),
        warp_row(warp() * kRowTiles * 16),
        q_tile(shared_memory()),
        k_tile(q_tile + kRows * kRowBytes),
        v_tile(k_tile + kKeys * kRowBytes) {}

  __device__ __forceinline__ void copy_keys(unsigned char* tile, const AttentionTensor& t, int key) const {
    copy_tile<T, kRowBytes, kKeys, kThreads>(tile, key_rows<const T>(t, s) + key * t.token, t.token,
                                             s.keys - key, static_cast<int>(p.head_dim), plan.aligned_inputs);
  }
  // From `key` on, the next tile that a query of the block may see.
  __device__ __forceinline__ int next_tile(int key, int end) const {
    while (key < end && !s.visits(first, first + kRows, key, key + kKeys)) key += kKeys;
    return key;
  }
  // This lane's queries, rows g and g + 8 of row tile r.
  __device__ __forceinline__ int query_of(int r, int i) const {
    return first + warp_row + 16 * r + 8 * i + lane() / 4;
  }

  // Raw products to what the softmax takes.
  __device__ __forceinline__ void finish_scores(const ScoreTerms<T>& terms, int key, Scores& x) const {
    const int begin = first + warp_row, end = min(begin + kRowTiles * 16, s.queries);
    const bool all_seen = s.all_seen(begin, end, key, key + kKeys);
    const bool modified = !kPlain && plan.modified;
    if (!modified && all_seen) return;
#pragma unroll
    for (int r = 0; r < kRowTiles; ++r) {
      float (&flat)[kKeys / 2] = reinterpret_cast<float (&)[kKeys / 2]>(x[r]);
      const auto key_of = [&](int i) { return key + 8 * (i / 4) + 2 * (lane() % 4) + i % 2; };
      if (modified) {
        const ScoreRow rows[2] = {terms.row(in_place(query_of(r, 0))), terms.row(in_place(query_of(r, 1)))};
        terms.modify(flat, [&](int i) -> const ScoreRow& { return rows[i / 2 % 2]; }, key_of);
      }
      if (all_seen) continue;
      const RowMask masks[2] = {s.mask_of(in_place(query_of(r, 0))), s.mask_of(in_place(query_of(r, 1)))};
      hide_unseen(flat, s.stride, [&](int i) -> const RowMask& { return masks[i / 2 % 2]; }, key_of);
    }
  }

  // Zeros in the place of what is dropped.
  __device__ __forceinline__ void drop(const DropoutBits& bits, int key, Scores& x) const {
#pragma unroll
    for (int r = 0; r < kRowTiles; ++r) {
#pragma unroll
      for (int j = 0; j < kKeys / 8; j += 2) {
        uint32_t words[4];
        bits.query_words(query_of(r, 0), key + 8 * j, words);
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          float* pair = &x[r][j + i / 2][2 * (i % 2)];
          if (!bits.keeps_low(words[i])) pair[0] = 0.0f;
          if (!bits.keeps_high(words[i])) pair[1] = 0.0f;
        }
      }
    }
  }

  // By way of the query tile's rows of this warp, which nobody else reads.
  __device__ __forceinline__ void write(OnlineSoftmax<kRowTiles>& softmax, Sums& o) const {
    softmax.finish();
    const int t = lane() % 4;
    __syncwarp();
#pragma unroll
    for (int r = 0; r < kRowTiles; ++r) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const int query = query_of(r, i), row = warp_row + 16 * r + 8 * i + lane() / 4;
        const bool any = query < s.queries && !s.keys_of(query).empty();
        const float factor = any && softmax.sum[r][i] != 0.0f ? p.keep_scale / softmax.sum[r][i] : 0.0f;
        if (p.lse && query < s.queries && t == 0) lse_rows(p.lse, p, s)[query] = softmax.lse(r, i);
#pragma unroll
        for (int n = 0; n < kDim / 8; ++n) {  // what lies in o may come from nowhere where the factor is 0
          const float low = factor == 0.0f ? 0.0f : o[r][n][2 * i] * factor;
          const float high = factor == 0.0f ? 0.0f : o[r][n][2 * i + 1] * factor;
          if constexpr (sizeof(T) == 4) {
            unsigned char* at = q_tile + swizzled<kRowBytes>(row, 2 * n + t / 2) + 8 * (t % 2);
            *reinterpret_cast<float2*>(at) = make_float2(low, high);
          } else {
            *reinterpret_cast<uint32_t*>(q_tile + swizzled<kRowBytes>(row, n) + 4 * t) =
                pack_pair<T>(low, high);
          }
        }
      }
    }
    __syncwarp();
    store_rows<T, kRowBytes, 16 * kRowTiles>(q_tile, warp_row, query_rows<T>(p.out, s) + first * p.out.token,
                                             p.out.token, s.queries - first, static_cast<int>(p.head_dim),
                                             plan.aligned_output);
  }

  __device__ __forceinline__ void run() const {
    const ScoreTerms<T> terms(p, s);
    const DropoutBits bits(p, s);
    const float factor = !kPlain && plan.modified ? 1.0f : terms.factor();
    const int last = min(first + kRows, s.queries);
    const KeyRange seen = s.keys_of_queries(first, last);
    // Most keys of a causal tile are no business of its first warps.
    const bool idle = first + warp_row >= s.queries;
    const KeyRange own =
        idle ? KeyRange{0, 0}
             : s.keys_of_queries(first + warp_row, min(first + warp_row + kRowTiles * 16, last));
    OnlineSoftmax<kRowTiles> softmax;
    softmax.start(!kPlain && p.sinks ? p.sinks[s.head] * kLog2e : -INFINITY);
    Sums o = {};
    int key = next_tile(seen.begin / kKeys * kKeys, seen.end);
    if (key < seen.end) {
      copy_tile<T, kRowBytes, kRows, kThreads>(q_tile, query_rows<const T>(p.q, s) + first * p.q.token,
                                               p.q.token, s.queries - first, static_cast<int>(p.head_dim),
                                               plan.aligned_inputs);
      copy_keys(k_tile, p.k, key);
      copy_async_commit();
    }
    while (key < seen.end) {
      const bool busy = key < own.end && key + kKeys > own.begin;
      copy_async_wait<0>();
      __syncthreads();  // the keys are here, and the values before them done with
      copy_keys(v_tile, p.v, key);
      copy_async_commit();
      Scores x;
      if (busy) Products::template scores<kRowTiles, kKeys>(q_tile, warp_row, k_tile, x);
      const int next = next_tile(key + kKeys, seen.end);
      copy_async_wait<0>();
      __syncthreads();  // the values are here, and the keys done with
      if (next < seen.end) copy_keys(k_tile, p.k, next);
      copy_async_commit();
      if (busy) {
        finish_scores(terms, key, x);
        softmax.step(x, factor, o);
        if (!kPlain && p.keep < kKeepAll) drop(bits, key, x);
        Products::template values<kRowTiles, kKeys>(x, v_tile, o);
      }
      key = next;
    }
    write(softmax, o);
  }
};

template <class T, int kDim, bool kPlain>
__global__ void __launch_bounds__(ForwardBlock<T, kDim, kPlain>::kThreads)
    forward_tiles(const __grid_constant__ AttentionProblem p, const __grid_constant__ ForwardPlan plan) {
  using Block = ForwardBlock<T, kDim, kPlain>;
  int head;
  const TileOfBatch tile = block_tile(p, plan, Block::kRows, &head);
  AttentionSequence s = sequence_of(p, tile.index, head);
  if (kPlain) s.stride = 0;  // known, so that what patterns ask for is left out
  if (tile.first >= s.queries) return;
  Block(p, s, plan, tile.first).run();
}

// A scale that does not keep the order of scores counts as a change of them.
bool modified_scores(const AttentionProblem& p) { return p.modified || !(p.scale > 0.0f); }

template <class T, int kDim, bool kPlain>
void launch_forward(const AttentionProblem& p) {
  constexpr ForwardShape kTile = ForwardBlock<T, kDim, kPlain>::kTile;
  const int64_t tiles = attention_tiles(p.cu_q, p.total_q, p.cu_q ? p.batch : 1, p.queries, kTile.rows());
  ForwardPlan plan{};
  plan.tiles = static_cast<int>(tiles);
  plan.aligned_inputs = has_aligned_rows(p.q, sizeof(T)) && has_aligned_rows(p.k, sizeof(T)) &&
                        has_aligned_rows(p.v, sizeof(T));
  plan.modified = modified_scores(p);
  plan.aligned_output = has_aligned_rows(p.out, sizeof(T));
  const int64_t blocks = tiles * p.heads * (p.cu_q ? 1 : p.batch);
  launch<&forward_tiles<T, kDim, kPlain>>({dim3(static_cast<unsigned>(blocks)), dim3(kTile.threads()),
                                           kTile.shared_bytes(kDim * static_cast<int>(sizeof(T)))},
                                          p, plan);
}

template <class T, int kDim>
void launch_forward(const AttentionProblem& p) {
  if constexpr (has_plain_forward(sizeof(T), kDim)) {
    if (!modified_scores(p) && p.keep == kKeepAll && p.stride == 0) return launch_forward<T, kDim, true>(p);
  }
  launch_forward<T, kDim, false>(p);
}

}  // namespace

template <class T>
void attention_forward_mma(const AttentionProblem& p) {
  const int dim = padded_dim(sizeof(T), p.head_dim);
  if constexpr (sizeof(T) == 2) {
    if (dim == 96) return launch_forward<T, 96>(p);
    if (dim == 192) return launch_forward<T, 192>(p);
  }
  if (dim == 32) return launch_forward<T, 32>(p);
  if (dim == 64) return launch_forward<T, 64>(p);
  if (dim == 128) return launch_forward<T, 128>(p);
  launch_forward<T, 256>(p);
}
template void attention_forward_mma<float>(const AttentionProblem& p);
template void attention_forward_mma<tf32>(const AttentionProblem& p);
template void attention_forward_mma<bf16>(const AttentionProblem& p);
template void attention_forward_mma<f16>(const AttentionProblem& p);

}  // namespace gptcore::cuda
