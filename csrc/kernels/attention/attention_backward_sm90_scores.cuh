// What a consumer of attention_backward_sm90.cuh does to its 64 x kQueries scores (keys by queries) between products,
// in registers: scores to probabilities, gradients of probabilities to those of scores. In its thread element
// 4 j + 2 h + e is key row + 8 h and query column + 8 j + e, as wgmma.cuh lays out sums.
#pragma once

#include <cstdint>

#include "kernels/attention/attention_scores.cuh"

namespace gptcore::cuda::backward_sm90 {

// The scores of one warpgroup's keys with one tile of queries, as a thread of it sees them.
struct ScoreTile {
  int distance;  // its first key less its first query's own place
  int lowest,
      highest[2];  // distances that are seen by its keys, which may lie in the prefix or behind the last
  bool whole;      // all that the warpgroup has is seen

  // keys, queries: the first of the warpgroup's 64 and of the tile's `count`.
  __device__ ScoreTile(const AttentionSequence& s, int keys, int queries, int count) {
    const int row = keys + static_cast<int>(threadIdx.x) / kWarp % 4 * 16 + lane() / 4,
              place = s.place_of(queries);
    distance = row - place - lane() % 4 * 2;
    lowest = s.left < 0 ? INT32_MIN : -s.left;
    const int most = s.right < 0 ? INT32_MAX : s.right;
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int key = row + 8 * h;
      highest[h] = key >= s.keys ? INT32_MIN : key < s.prefix ? INT32_MAX : most;
    }
    whole = keys + 64 <= s.keys && (keys + 64 <= s.prefix || keys + 63 - place <= most) &&
            keys - (place + count - 1) >= lowest;
  }

  template <int j, int h, int e>
  __device__ bool sees() const {
    const int d = distance + 8 * h - 8 * j - e;
    return d >= lowest && d <= highest[h];
  }
};

// Which of a thread's elements dropout keeps: bit 8 (2 e + h) + j % 8 of word j / 8.
template <int kQueries>
struct KeptElements {
  uint32_t bits[kQueries / 64];

  template <int j, int h, int e>
  __device__ bool keeps() const {
    return bits[j / 8] >> (8 * (2 * e + h) + j % 8) & 1;
  }
};

// A call of Philox serves eight keys of a query, a lane wants one of them. So of 64 queries lane 4 r + m makes the four
// calls for the 16 keys of its warp and the queries 8 r + 2 m and the one after it, leaves a bit for each key, and the
// lanes fetch each other's bits.
// keys, queries: the first of the warpgroup's and of the tile's. head: over all sequences.
template <int kQueries, bool kModified>
__device__ __forceinline__ KeptElements<kQueries> draw_kept(const AttentionProblem& p, int keys, int queries,
                                                            int head) {
  KeptElements<kQueries> kept;
#pragma unroll
  for (uint32_t& bits : kept.bits) bits = ~0u;
  if (!kModified || p.keep >= 65536) return kept;
  const uint64_t seed = p.seed_at ? static_cast<uint64_t>(*p.seed_at) : p.seed;
  const int group = lane() / 4;
  const uint32_t first_eight =
      static_cast<uint32_t>(keys / 8 + static_cast<int>(threadIdx.x) / kWarp % 4 * 2);
#pragma unroll
  for (int half = 0; half < kQueries / 64; ++half) {
    const uint32_t query = static_cast<uint32_t>(queries + 64 * half + 8 * group + lane() % 4 * 2);
    uint32_t mine = 0;
#pragma unroll 1
    for (uint32_t call = 0; call < 4; ++call) {  // 2 e + h
      const PhiloxWords words =
          philox(seed, {{first_eight + call % 2, query + call / 2, static_cast<uint32_t>(head), p.offset}});
      uint32_t eight = 0;
#pragma unroll
      for (int key = 0; key < 8; ++key) {
        const uint32_t value = words.at[key / 2] >> (key % 2 * 16) & 0xffffu;
        eight |= static_cast<uint32_t>(static_cast<int>(value) < p.keep) << key;
      }
      mine |= eight << (8 * call);
    }
    uint32_t bits = 0;
#pragma unroll
    for (int j = 0; j < 8; ++j)
      bits |= (__shfl_sync(kFullMask, mine, 4 * j + lane() % 4) >> group & 0x01010101u) << j;
    kept.bits[half] = bits;
  }
  return kept;
}

// Products q . k to probabilities, times the soft cap's derivative where there is one; and what dV takes of them, without
// that and with dropout but for its scale, packed as wgmma's first operand. lse: of the tile's queries from this
// thread's column on, in powers of two. kMasked: whether any key may be hidden.
template <class T, int kQueries, bool kModified, bool kMasked>
struct Probabilities {
  static constexpr int kCount = kQueries / 2;

  const AttentionProblem& problem;
  float slope;  // of the head, in powers of two
  const ScoreTile& tile;
  const KeptElements<kQueries>& kept;

  // The four elements of queries 8 j + ...: scores in powers of two, and derivatives by the scaled products.
  template <int j>
  __device__ __forceinline__ void modify(const float* scores, float (&x)[4], float (&derivatives)[4]) const {
    if (problem.soft_cap > 0) {
      const float inner = problem.scale / problem.soft_cap, cap = problem.soft_cap * kLog2e;
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const float t = cap_tanh<T>(scores[i] * inner);
        x[i] = t * cap, derivatives[i] = 1.0f - t * t;
      }
    } else {
#pragma unroll
      for (int i = 0; i < 4; ++i) x[i] = scores[i] * (problem.scale * kLog2e), derivatives[i] = 1.0f;
    }
    // A slope of 0 where there are none.
    const float distance = static_cast<float>(tile.distance - 8 * j);
    x[0] -= slope * fabsf(distance), x[1] -= slope * fabsf(distance - 1.0f);
    x[2] -= slope * fabsf(distance + 8.0f), x[3] -= slope * fabsf(distance + 7.0f);
  }

  template <int j = 0>
  __device__ __forceinline__ void all(const float (&scores)[kCount], const float* lse,
                                      float (&factors)[kCount], uint32_t (&operand)[kQueries / 16][4]) const {
    if constexpr (j < kQueries / 8) {
      const float2 l = *reinterpret_cast<const float2*>(lse + 8 * j);
      float p[4], derivatives[4];
      if constexpr (kModified) {
        modify<j>(scores + 4 * j, p, derivatives);
      } else {
#pragma unroll
        for (int i = 0; i < 4; ++i) p[i] = scores[4 * j + i] * (problem.scale * kLog2e);
      }
#pragma unroll
      for (int i = 0; i < 4; ++i) p[i] = exp2_approximate(p[i] - (i % 2 ? l.y : l.x));
      if constexpr (kMasked) {
        p[0] = tile.template sees<j, 0, 0>() ? p[0] : 0.0f,
        p[1] = tile.template sees<j, 0, 1>() ? p[1] : 0.0f;
        p[2] = tile.template sees<j, 1, 0>() ? p[2] : 0.0f,
        p[3] = tile.template sees<j, 1, 1>() ? p[3] : 0.0f;
      }
#pragma unroll
      for (int i = 0; i < 4; ++i) factors[4 * j + i] = kModified ? p[i] * derivatives[i] : p[i];
      if constexpr (kModified) {  // all are kept where nothing is dropped
        p[0] = kept.template keeps<j, 0, 0>() ? p[0] : 0.0f,
        p[1] = kept.template keeps<j, 0, 1>() ? p[1] : 0.0f;
        p[2] = kept.template keeps<j, 1, 0>() ? p[2] : 0.0f,
        p[3] = kept.template keeps<j, 1, 1>() ? p[3] : 0.0f;
      }
      operand[j / 2][j % 2 * 2] = pack_pair<T>(p[0], p[1]);
      operand[j / 2][j % 2 * 2 + 1] = pack_pair<T>(p[2], p[3]);
      all<j + 1>(scores, lse, factors, operand);
    }
  }
};

// dS = P (dP - delta), packed as wgmma's first operand; p with the soft cap's derivative.
template <class T, int kQueries, bool kModified>
struct ScoreGradients {
  static constexpr int kCount = kQueries / 2;

  float keep_scale;
  const KeptElements<kQueries>& kept;

  template <int j, int h, int e>
  __device__ __forceinline__ float one(float p, float dp, float delta) const {
    if (kModified) dp = kept.template keeps<j, h, e>() ? dp * keep_scale : 0.0f;
    return p * (dp - delta);
  }

  template <int j = 0>
  __device__ __forceinline__ void all(const float (&p)[kCount], const float (&dp)[kCount], const float* delta,
                                      uint32_t (&operand)[kQueries / 16][4]) const {
    if constexpr (j < kQueries / 8) {
      const float2 d = *reinterpret_cast<const float2*>(delta + 8 * j);
      constexpr int i = 4 * j;
      operand[j / 2][j % 2 * 2] =
          pack_pair<T>(one<j, 0, 0>(p[i], dp[i], d.x), one<j, 0, 1>(p[i + 1], dp[i + 1], d.y));
      operand[j / 2][j % 2 * 2 + 1] =
          pack_pair<T>(one<j, 1, 0>(p[i + 2], dp[i + 2], d.x), one<j, 1, 1>(p[i + 3], dp[i + 3], d.y));
      all<j + 1>(p, dp, delta, operand);
    }
  }
};

}  // namespace gptcore::cuda::backward_sm90
