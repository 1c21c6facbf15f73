// Attention of few queries over many keys, as in decoding: limited by how fast keys and values come from memory.
//
// The rows of a block are the queries of all heads that share a key head, 16 of them; each of its four warps takes 16 of
// the 64 keys of a tile and a softmax of its own. Keys are split over blocks (as in Flash-Decoding, Dao et al. 2023), by
// their number alone, so that results do not depend on the device or the batch; a second kernel joins the parts in order.
#include "core/cuda/launch.cuh"
#include "core/cuda/scratch.h"
#include "kernels/attention/attention_cuda.h"
#include "kernels/attention/attention_decode_plan.h"
#include "kernels/attention/attention_products.cuh"
#include "kernels/attention/attention_scores.cuh"
#include "kernels/attention/attention_softmax.cuh"
#include "kernels/attention/attention_tile_copy.cuh"

namespace gptcore::cuda {
namespace {

// What the first kernel leaves for the second: of row i and part j, at (i parts + j), an output of head_dim and lse in
// powers of two. Rows count the queries of a batch, key head by key head.
struct DecodeParts {
  float *out, *lse;
};

template <class T, int kDim>
struct DecodeBlock {
  static constexpr int kRows = kDecodeRows, kKeys = kDecodeKeys, kOwnKeys = kKeys / kDecodeWarps;
  static constexpr int kThreads = kDecodeWarps * kWarp, kRowBytes = kDim * static_cast<int>(sizeof(T));
  using Products = AttentionProducts<T, kDim>;

  const AttentionProblem& p;
  const DecodePlan& plan;
  const AttentionSequence& s;
  const int first;  // row
  unsigned char *const q_tile, *const k_tile, *const v_tile;

  __device__ DecodeBlock(const AttentionProblem& p, const DecodePlan& plan, const AttentionSequence& s,
                         int first)
      : p(p),
        plan(plan),
        s(s),
        first(first),
        q_tile(shared_memory()),
        k_tile(q_tile + kRows * kRowBytes),
        v_tile(k_tile + kKeys * kRowBytes) {}

  __device__ int query_of(int row) const { return (first + row) / plan.group; }
  __device__ int head_of(int row) const { return s.head + (first + row) % plan.group; }

  __device__ __forceinline__ void copy_queries() const {
    const T* base = query_rows<const T>(p.q, s);
    copy_rows<T, kRowBytes, kRows, kThreads>(
        q_tile,
        [&](int row) { return base + query_of(row) * p.q.token + (first + row) % plan.group * p.q.head; },
        base, plan.rows - first, static_cast<int>(p.head_dim), plan.aligned);
  }
  __device__ __forceinline__ void copy_keys(unsigned char* tile, const AttentionTensor& t, int key,
                                            int end) const {
    copy_tile<T, kRowBytes, kKeys, kThreads>(tile, key_rows<const T>(t, s) + key * t.token, t.token,
                                             end - key, static_cast<int>(p.head_dim), plan.aligned);
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
  __device__ __forceinline__ void write(OnlineSoftmax<1>& softmax, const float (&o)[1][kDim / 8][4],
                                        int64_t part_row, int part, const DecodeParts& parts) const {
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
      for (int n = 0; n < kDim / 8; ++n)
        *reinterpret_cast<float2*>(sums + at * kDim + 8 * n + 2 * t) =
            make_float2(o[0][n][2 * i], o[0][n][2 * i + 1]);
    }
    __syncthreads();
    for (int i = static_cast<int>(threadIdx.x); i < kRows * kDim; i += kThreads) {
      const int row = i / kDim, d = i % kDim;
      if (first + row >= plan.rows || d >= p.head_dim) continue;
      float top = -INFINITY, sum = 0.0f, value = 0.0f;
      for (int w = 0; w < kDecodeWarps; ++w) top = fmaxf(top, states[2 * (w * kRows + row)]);
      const float shift = top == -INFINITY ? 0.0f : top;
      for (int w = 0; w < kDecodeWarps; ++w) {
        const float weight = exp2_approximate(states[2 * (w * kRows + row)] - shift);
        const float part_sum = states[2 * (w * kRows + row) + 1];
        if (part_sum == 0.0f) continue;  // nothing seen: what lies in its output may come from nowhere
        // A warp that has met nothing but NaN has no shift.
        const float by = top == -INFINITY ? 1.0f : weight;
        sum += by * part_sum, value += by * sums[(w * kRows + row) * kDim + d];
      }
      const int64_t at = (part_row + row) * plan.parts + part;
      parts.out[at * p.head_dim + d] = sum == 0.0f ? 0.0f : value / sum;
      if (d == 0) parts.lse[at] = sum == 0.0f ? -INFINITY : shift + log2f(sum);
    }
  }

  __device__ __forceinline__ void run(int64_t part_row, int part, const DecodeParts& parts) const {
    const ScoreTerms<T> terms(p, s);
    const float factor = plan.modified ? 1.0f : terms.factor();
    const int own = warp() * kOwnKeys;
    int key = plan.begin + part * plan.part_keys;
    const int end = min(key + plan.part_keys, s.keys);
    OnlineSoftmax<1> softmax;
    softmax.start(-INFINITY);
    float o[1][kDim / 8][4] = {};
    if (key < end) {
      copy_queries();
      copy_keys(k_tile, p.k, key, end);
      copy_async_commit();
    }
    for (; key < end; key += kKeys) {
      copy_async_wait<0>();
      __syncthreads();  // the keys are here, and the values before them done with
      copy_keys(v_tile, p.v, key, end);
      copy_async_commit();
      float x[1][kOwnKeys / 8][4];
      Products::template scores<1, kOwnKeys>(q_tile, 0, k_tile + own * kRowBytes, x);
      copy_async_wait<0>();
      __syncthreads();  // the values are here, and the keys done with
      if (key + kKeys < end) copy_keys(k_tile, p.k, key + kKeys, end);
      copy_async_commit();
      finish_scores(terms, key + own, end, x);
      softmax.step(x, factor, o);
      Products::template values<1, kOwnKeys>(x, v_tile + own * kRowBytes, o);
    }
    write(softmax, o, part_row, part, parts);
  }
};

template <class T, int kDim>
__global__ void __launch_bounds__(kDecodeWarps* kWarp, 1)
    decode_parts(const __grid_constant__ AttentionProblem p, const __grid_constant__ DecodePlan plan,
                 const DecodeParts parts) {
  const int block = static_cast<int>(blockIdx.x), part = block % plan.parts, outer = block / plan.parts;
  const int first = outer % plan.row_blocks * kDecodeRows, unit = outer / plan.row_blocks;
  const int kv_heads = static_cast<int>(p.kv_heads);
  const AttentionSequence s = sequence_of(p, unit / kv_heads, unit % kv_heads * plan.group);
  DecodeBlock<T, kDim>(p, plan, s, first).run(int64_t{unit} * plan.rows + first, part, parts);
}

// One block a row.
template <class T>
__global__ void __launch_bounds__(kJoinThreads)
    join_parts(const __grid_constant__ AttentionProblem p, const __grid_constant__ DecodePlan plan,
               const DecodeParts parts) {
  const int64_t row = blockIdx.x, unit = row / plan.rows;
  const int kv_heads = static_cast<int>(p.kv_heads), within = static_cast<int>(row % plan.rows);
  const int head = static_cast<int>(unit % kv_heads) * plan.group + within % plan.group,
            query = within / plan.group;
  const AttentionSequence s = sequence_of(p, static_cast<int>(unit / kv_heads), head);
  const float* lse = parts.lse + row * plan.parts;
  const float sink = p.sinks ? p.sinks[head] * kLog2e : -INFINITY;
  float top = sink, sum = 0.0f;
  for (int j = 0; j < plan.parts; ++j) top = fmaxf(top, lse[j]);
  const float shift = top == -INFINITY ? 0.0f : top;
  for (int j = 0; j < plan.parts; ++j) sum += exp2f(lse[j] - shift);
  sum += exp2f(sink - shift);
  const float inverse = sum == 0.0f ? 0.0f : 1.0f / sum;
  T* out = query_rows<T>(p.out, s) + query * p.out.token;
  for (int d = static_cast<int>(threadIdx.x); d < p.head_dim; d += kJoinThreads) {
    float value = 0.0f;
    for (int j = 0; j < plan.parts; ++j)
      value += exp2f(lse[j] - shift) * parts.out[(row * plan.parts + j) * p.head_dim + d];
    out[d] = from_float<T>(value * inverse);
  }
  if (p.lse && threadIdx.x == 0)
    lse_rows(p.lse, p, s)[query] = sum == 0.0f ? -INFINITY : shift * kLn2 + logf(sum);
}

template <class T, int kDim>
void launch_decode(const AttentionProblem& p, const DecodePlan& plan) {
  const int64_t rows = p.batch * p.kv_heads * plan.rows;
  const DeviceScratch scratch(rows * plan.parts * (p.head_dim + 1) * static_cast<int64_t>(sizeof(float)));
  const DecodeParts parts{scratch.as<float>(), scratch.as<float>() + rows * plan.parts * p.head_dim};
  const int64_t blocks = p.batch * p.kv_heads * plan.row_blocks * plan.parts;
  launch<&decode_parts<T, kDim>>(
      {dim3(static_cast<unsigned>(blocks)), dim3(kDecodeWarps * kWarp), decode_shared_bytes(kDim, sizeof(T))},
      p, plan, parts);
  launch<&join_parts<T>>({dim3(static_cast<unsigned>(rows)), dim3(kJoinThreads)}, p, plan, parts);
}

}  // namespace

template <class T>
bool attention_decode_takes(const AttentionProblem& p) {
  return decode_takes(p, sizeof(T));
}

template <class T>
void attention_decode(const AttentionProblem& p) {
  DecodePlan plan = decode_plan(p);
  plan.aligned = has_aligned_rows(p.q, sizeof(T)) && has_aligned_rows(p.k, sizeof(T)) &&
                 has_aligned_rows(p.v, sizeof(T));
  if (p.head_dim <= 64) return launch_decode<T, 64>(p, plan);
  if (p.head_dim <= 128) return launch_decode<T, 128>(p, plan);
  if constexpr (sizeof(T) == 2) launch_decode<T, 256>(p, plan);
}

template bool attention_decode_takes<float>(const AttentionProblem& p);
template bool attention_decode_takes<bf16>(const AttentionProblem& p);
template bool attention_decode_takes<f16>(const AttentionProblem& p);
template void attention_decode<float>(const AttentionProblem& p);
template void attention_decode<bf16>(const AttentionProblem& p);
template void attention_decode<f16>(const AttentionProblem& p);

}  // namespace gptcore::cuda
