// From raw products q . k to what the softmax takes, for CUDA's kernels of both directions: soft cap, ALiBi, bias, mask
// and dropout, on values that a thread holds in registers. Scores come out in powers of two: scaled and times log2(e),
// so that a probability is exp2(score - shift) with shift = lse log2(e).
//
// Fragments have queries as rows (forward, and backward's q k^T) or keys as rows (backward's k q^T), so functions take
// a count of values and two lambdas that say whose they are; unrolled, both are constants but for an addition.
#pragma once

#include "core/cuda/approximate.cuh"
#include "core/cuda/convert.cuh"
#include "core/cuda/in_place.cuh"
#include "core/cuda/philox.cuh"
#include "kernels/attention/attention_masks.cuh"

namespace gptcore::cuda {

constexpr float kLog2e = 1.44269504088896341f;
constexpr float kLn2 = 0.69314718055994531f;

// tanh to about 1e-7 absolutely, which is what a score needs; T float takes the library's.
template <class T>
__device__ __forceinline__ float cap_tanh(float x) {
  if constexpr (sizeof(T) == 4) return tanhf(x);
  return 1.0f - 2.0f * reciprocal_approximate(1.0f + exp2_approximate(x * (2.0f * kLog2e)));
}

// What of a row (query) the modified scores need. Small enough to lie in shared memory.
struct ScoreRow {
  int place;           // the key at the query's own place
  float slope;         // ALiBi's, times log2(e)
  int64_t bias, mask;  // offsets of its row, in elements
};

// T is q's type.
template <class T>
class ScoreTerms {
 public:
  __device__ ScoreTerms(const AttentionProblem& p, const AttentionSequence& s)
      : p_(p),
        s_(s),
        inner_(p.soft_cap > 0.0f ? p.scale / p.soft_cap : p.scale * kLog2e),
        slope_(p.slopes ? slope_of(s.head) : 0.0f) {}

  // Scale that a raw score lacks where nothing else is done to it.
  __device__ float factor() const { return p_.scale * kLog2e; }

  // Queries beyond the last take the last's.
  __device__ ScoreRow row(int query) const { return row(query, s_.head, slope_); }
  // Of another head than the sequence's.
  __device__ ScoreRow row(int query, int head) const {
    return row(query, head, p_.slopes ? slope_of(head) : 0.0f);
  }

  // x[i], the raw product of the query of row_of(i) with key key_of(i), becomes its score; -inf where hidden by bias or
  // mask, whatever x was. Keys beyond the last are given anything. With kDerivative cap_slopes[i] becomes what the soft
  // cap multiplies a score's gradient by (1 without a cap).
  template <bool kDerivative = false, int kCount, class RowOf, class KeyOf>
  __device__ __forceinline__ void modify(float (&x)[kCount], const RowOf& row_of, const KeyOf& key_of,
                                         float* cap_slopes = nullptr) const {
    if (p_.soft_cap > 0.0f) {
#pragma unroll
      for (int i = 0; i < kCount; ++i) {
        const float t = cap_tanh<T>(x[i] * inner_);
        x[i] = p_.soft_cap * kLog2e * t;
        if constexpr (kDerivative) cap_slopes[i] = 1.0f - t * t;
      }
    } else {
#pragma unroll
      for (int i = 0; i < kCount; ++i) {
        x[i] *= inner_;
        if constexpr (kDerivative) cap_slopes[i] = 1.0f;
      }
    }
    if (p_.slopes) {
#pragma unroll
      for (int i = 0; i < kCount; ++i) {
        const ScoreRow& row = row_of(i);
        x[i] -= row.slope * fabsf(static_cast<float>(row.place - key_of(i)));
      }
    }
    if (p_.bias.data) {
#pragma unroll
      for (int i = 0; i < kCount; ++i) {
        const float bias = bias_at(row_of(i).bias, key_of(i));
        x[i] = bias == -INFINITY ? bias : x[i] + bias * kLog2e;
      }
    }
    if (p_.mask.data) {
#pragma unroll
      for (int i = 0; i < kCount; ++i) {
        if (!mask_at(row_of(i).mask, key_of(i))) x[i] = -INFINITY;
      }
    }
  }

 private:
  __device__ float slope_of(int head) const {
    return p_.slopes[s_.index * p_.slopes_batch + head * p_.slopes_head] * kLog2e;
  }
  __device__ ScoreRow row(int query, int head, float slope) const {
    query = min(query, s_.queries - 1);
    return {s_.place_of(query), slope, s_.index * p_.bias.batch + head * p_.bias.head + query * p_.bias.token,
            s_.index * p_.mask.batch + head * p_.mask.head + query * p_.mask.token};
  }
  __device__ __forceinline__ float bias_at(int64_t row, int key) const {
    if (key >= s_.keys) return 0.0f;
    if (sizeof(T) == 2 && p_.bias_16bit) return to_float(static_cast<const T*>(p_.bias.data)[row + key]);
    return static_cast<const float*>(p_.bias.data)[row + key];
  }
  __device__ __forceinline__ bool mask_at(int64_t row, int key) const {
    return key < s_.keys && static_cast<const uint8_t*>(p_.mask.data)[row + key] != 0;
  }

  const AttentionProblem& p_;
  const AttentionSequence& s_;
  const float inner_, slope_;
};

// Gives -inf to the values whose key their query does not see. row_of(i) is a RowMask; `stride` the pattern's.
template <int kCount, class RowOf, class KeyOf>
__device__ __forceinline__ void hide_unseen(float (&x)[kCount], int stride, const RowOf& row_of,
                                            const KeyOf& key_of) {
  if (stride == 0) {
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      if (!row_of(i).sees(key_of(i))) x[i] = -INFINITY;
    }
  } else {
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      if (!row_of(i).sees(key_of(i), key_of(i) % stride)) x[i] = -INFINITY;
    }
  }
}

// Among four lanes that differ in the bits kStep and 2 kStep of their number, of which this is `place`: word i of lane j
// for word j of lane i.
template <int kStep>
__device__ __forceinline__ void transpose_lanes(int place, uint32_t (&words)[4]) {
#pragma unroll
  for (int bit = 1; bit <= 2; bit *= 2) {
    const bool upper = place & bit;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if (i & bit) continue;
      const uint32_t low = words[i], high = words[i + bit];
      const uint32_t got = __shfl_xor_sync(kFullMask, upper ? low : high, bit * kStep);
      words[i] = upper ? got : low, words[i + bit] = upper ? high : got;
    }
  }
}

// --- dropout ----------------------------------------------------------------------------------------------------

// Which probabilities stay: the bits of attention.h, drawn by the lanes that need the same words together, each for one
// of their counters.
class DropoutBits {
 public:
  __device__ DropoutBits(const AttentionProblem& p, const AttentionSequence& s)
      : seed_(p.seed_at ? static_cast<uint64_t>(*p.seed_at) : p.seed),
        head_(static_cast<uint32_t>(s.index * p.heads + s.head)),
        offset_(p.offset),
        keep_(static_cast<uint32_t>(p.keep)) {}

  // The lower and the upper half of a word: whether each keeps its probability.
  __device__ bool keeps_low(uint32_t word) const { return (word & 0xffffu) < keep_; }
  __device__ bool keeps_high(uint32_t word) const { return word >> 16 < keep_; }

  // Queries as rows: for a lane of a fragment 16 x 16 (g = lane / 4, t = lane % 4; key a multiple of 8), words of
  //   [0] query, keys key + 2 t and + 1    [1] query + 8, the same keys    [2], [3] the same for keys 8 further
  // each key's bits in the half of its parity. `query` is the lane's own, first + g. All lanes of a warp come.
  __device__ __forceinline__ void query_words(int query, int key, uint32_t (&words)[4]) const {
    const int t = lane() & 3;
    const PhiloxWords own = draw(query + 8 * (t & 1), key / 8 + (t >> 1));
#pragma unroll
    for (int i = 0; i < 4; ++i) words[i] = own.at[i];
    transpose_lanes<1>(t, words);
  }

  // Keys as rows: for a lane of four fragments 8 x 8 (key + g and queries first + 8 j + 2 t and + 1; key a multiple of
  // 8), words[2 j + c] of key + g and query first + 8 j + 2 t + c, its bits in the upper half where g is odd. All lanes
  // of a warp come.
  __device__ __forceinline__ void key_words(int first, int key, uint32_t (&words)[8]) const {
    const int g = lane() >> 2, t = lane() & 3;
    // Lanes of one t share words. Of its eight queries lane g draws number (g / 2) + 4 (g % 2).
    const int mine = (g >> 1) + 4 * (g & 1);
    const PhiloxWords own = draw(first + 8 * (mine >> 1) + 2 * t + (mine & 1), key / 8);
    uint32_t half[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) half[i] = own.at[i];
    transpose_lanes<8>(g >> 1, half);  // word g / 2 of the four queries that lanes of this parity drew
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const uint32_t other = __shfl_xor_sync(kFullMask, half[i], 4);
      words[i] = g & 1 ? other : half[i];
      words[4 + i] = g & 1 ? half[i] : other;
    }
  }

 private:
  // The rounds' keys, 20 of them, are made from the seed for each call.
  __device__ PhiloxWords draw(int query, int group) const {
    return philox(in_place(seed_),
                  {{static_cast<uint32_t>(group), static_cast<uint32_t>(query), head_, offset_}});
  }

  const uint64_t seed_;
  const uint32_t head_, offset_, keep_;
};

}  // namespace gptcore::cuda
