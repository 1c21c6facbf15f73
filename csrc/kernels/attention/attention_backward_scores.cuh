// A warp's part of the scores of a tile of queries with a tile of keys: to probabilities, and to their gradients.
#pragma once

#include "kernels/attention/attention_backward_tile.cuh"
#include "kernels/attention/attention_scores.cuh"

namespace gptcore::cuda::backward_mma {

// kModified: scores are more than scaled, the mask is a pattern or probabilities are dropped.
template <class T, int kHead, bool kModified>
class ScoreTile {
 public:
  static constexpr BackwardTiles kTiles = backward_tiles(sizeof(T), kHead, kModified);
  static constexpr int kRows = kTiles.queries / 32, kColumns = kTiles.keys / 32;
  static constexpr int kHeadPitch = kTiles.head_pitch(), kScorePitch = kTiles.score_pitch();
  using Scores = Sums<kRows, kColumns>;
  static constexpr int kCount = Scores::kCount;

  __device__ __forceinline__ ScoreTile(const BackwardCall& c, const AttentionSequence& s, int head,
                                       int first_query, int first_key)
      : c_(c),
        s_(s),
        head_(head),
        query_(first_query),
        key_(first_key),
        row_(warp() / 4 * (kTiles.queries / 2)),
        column_(warp() % 4 * (kTiles.keys / 4)) {}

  // q k^T or dout v^T of the tiles in shared memory.
  __device__ __forceinline__ void product(Scores& sums, const T* queries, const T* keys) const {
    sums.clear();
    multiply<kHead, Depth::along_rows, kHeadPitch, Depth::along_rows, kHeadPitch>(
        sums, queries + row_ * kHeadPitch, keys + column_ * kHeadPitch);
  }

  // Products to probabilities. `kept` gets a bit for each that is not dropped; `slopes`, unless null, what the soft cap
  // multiplies its score's gradient by.
  __device__ __forceinline__ void probabilities(Scores& x, const float* lse, uint32_t& kept,
                                                float* slopes) const {
    kept = ~0u;
    const bool whole = s_.all_seen(query_, query_ + kTiles.queries, key_, key_ + kTiles.keys);
    float (&flat)[kCount] = x.flat();
    if constexpr (kModified) {
      const AttentionSequence own = of_head();
      const ScoreTerms<T> terms(c_.p, own);
      const auto row_of = [&](int i) { return terms.row(query_of(i)); };
      const auto key_of = [&](int i) { return this->key_of(i); };
      if (slopes) {
        terms.template modify<true>(flat, row_of, key_of, slopes);
      } else {
        terms.modify(flat, row_of, key_of);
      }
      if (c_.p.keep < kKeepAll) draw(kept);
    }
    const float factor = kModified ? 1.0f : c_.p.scale * kLog2e;
#pragma unroll
    for (int i = 0; i < kCount; ++i) flat[i] = exp2_approximate(flat[i] * factor - lse[row_of(i)]);
    if (!whole) hide(flat);
  }

  // P (dP - delta), where dP is that of what dropout left; x holds P.
  __device__ __forceinline__ void gradients(Scores& p, Scores& dp, const float* delta, uint32_t kept) const {
    const float (&from)[kCount] = p.flat();
    float (&flat)[kCount] = dp.flat();
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      float gradient = flat[i];
      if constexpr (kModified) gradient = kept >> i & 1 ? gradient * c_.p.keep_scale : 0.0f;
      flat[i] = from[i] * (gradient - delta[row_of(i)]);
    }
  }

  // To a tile of T in shared memory, zeros where `kept` has none.
  __device__ __forceinline__ void store(T* tile, Scores& x, uint32_t kept) const {
    const float (&flat)[kCount] = x.flat();
#pragma unroll
    for (int i = 0; i < kCount; i += 2) {
      const float first = !kModified || kept >> i & 1 ? flat[i] : 0.0f;
      const float second = !kModified || kept >> (i + 1) & 1 ? flat[i + 1] : 0.0f;
      T* at = tile + row_of(i) * kScorePitch + column_ + column_of(i);
      if constexpr (sizeof(T) == 4) {
        *reinterpret_cast<float2*>(at) = make_float2(first, second);
      } else {
        *reinterpret_cast<uint32_t*>(at) = pack_pair<T>(first, second);
      }
    }
  }

  // Row of value i in the tile, and column in the warp's part.
  __device__ __forceinline__ int row_of(int i) const {
    return row_ + i / (4 * kColumns) * 16 + lane() / 4 + (i >> 1 & 1) * 8;
  }
  __device__ __forceinline__ int column_of(int i) const {
    return i / 4 % kColumns * 8 + lane() % 4 * 2 + (i & 1);
  }
  __device__ __forceinline__ int query_of(int i) const { return query_ + row_of(i); }
  __device__ __forceinline__ int key_of(int i) const { return key_ + column_ + column_of(i); }

 private:
  __device__ __forceinline__ AttentionSequence of_head() const {
    AttentionSequence s = s_;
    s.head = head_;
    return s;
  }

  // Hidden probabilities are zeros, whatever the scores were.
  __device__ __forceinline__ void hide(float (&p)[kCount]) const {
#pragma unroll
    for (int row = 0; row < kCount; row += 4 * kColumns) {
#pragma unroll
      for (int half = 0; half < 4; half += 2) {
        const RowMask mask = s_.mask_of(query_of(row + half));
#pragma unroll
        for (int column = 0; column < 4 * kColumns; column += 4) {
#pragma unroll
          for (int e = 0; e < 2; ++e) {
            const int i = row + column + half + e, key = key_of(i);
            const bool seen = !kModified || s_.stride == 0 ? mask.sees(key) : mask.sees(key, key % s_.stride);
            if (!seen) p[i] = 0.0f;
          }
        }
      }
    }
  }

  __device__ __forceinline__ void draw(uint32_t& kept) const {
    const DropoutBits bits(c_.p, of_head());
    kept = 0;
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
#pragma unroll
      for (int j = 0; j < kColumns; j += 2) {
        uint32_t words[4];
        bits.query_words(query_ + row_ + 16 * i + lane() / 4, key_ + column_ + 8 * j, words);
#pragma unroll
        for (int w = 0; w < 4; ++w) {
          if (j + w / 2 >= kColumns) continue;
          const int at = (i * kColumns + j + w / 2) * 4 + w % 2 * 2;
          kept |= static_cast<uint32_t>(bits.keeps_low(words[w])) << at;
          kept |= static_cast<uint32_t>(bits.keeps_high(words[w])) << (at + 1);
        }
      }
    }
  }

  const BackwardCall& c_;
  const AttentionSequence& s_;
  const int head_;
  const int query_, key_;   // the tiles' first
  const int row_, column_;  // the warp's part
};

}  // namespace gptcore::cuda::backward_mma
