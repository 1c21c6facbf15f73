// What a multiplying thread of the forward kernel for sm_90 does with its registers: scores to probabilities, and O to
// memory. It holds parts of two rows, g and g + 8 of its warp's 16 (g = lane / 4, t = lane % 4): values 4 j + 2 h + c are
// row h's, columns 8 j + 2 t + c.
#pragma once

#include <cfloat>

#include "kernels/attention/attention_scores.cuh"

namespace gptcore::cuda {

// What is subtracted from a row's scores, and this thread's part of its sum.
struct ForwardRows {
  float shift[2], sum[2];
};

// How far, in powers of two, scores may exceed the shift before it moves and sums so far shrink: probabilities reach 2^8
// then, and O mostly stays as it is. Each row decides by its own scores.
constexpr float kForwardSlack = 8.0f;

// Scores become probabilities; a score counts `factor` times as a power of two. True for a warp of which some row's
// shift has moved: sums so far then count shrink[h] times.
template <int kCount>
__device__ __forceinline__ bool soften(float (&s)[kCount], float factor, ForwardRows& rows,
                                       float (&shrink)[2]) {
  float top[4] = {-INFINITY, -INFINITY, -INFINITY, -INFINITY}, sum[4] = {};  // two chains a row
#pragma unroll
  for (int i = 0; i < kCount; ++i) top[i / 2 % 2 * 2 + i % 2] = fmaxf(top[i / 2 % 2 * 2 + i % 2], s[i]);
  bool above = false;
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    top[h] = fmaxf(top[2 * h], top[2 * h + 1]) * factor;
    above |= top[h] > rows.shift[h] + kForwardSlack;
  }
  const bool moved = __any_sync(kFullMask, above);
  if (moved) {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      float highest = fmaxf(top[h], __shfl_xor_sync(kFullMask, top[h], 1));
      highest = fmaxf(highest, __shfl_xor_sync(kFullMask, highest, 2));
      const float shift = highest > rows.shift[h] + kForwardSlack ? highest : rows.shift[h];
      shrink[h] = shift == rows.shift[h] ? 1.0f : exp2_approximate(rows.shift[h] - shift);
      rows.shift[h] = shift, rows.sum[h] *= shrink[h];
    }
  }
  float minus[2];
#pragma unroll
  for (int h = 0; h < 2; ++h) minus[h] = rows.shift[h] == -INFINITY ? 0.0f : rows.shift[h];
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    s[i] = exp2_approximate(__fmaf_rn(s[i], factor, -minus[i / 2 % 2]));
    sum[i / 2 % 2 * 2 + i % 2] += s[i];
  }
#pragma unroll
  for (int h = 0; h < 2; ++h) rows.sum[h] += sum[2 * h] + sum[2 * h + 1];
  return moved;
}

// s = cap tanh(s inner), inner already times 2 log2(e): tanh x = 1 - 2 / (1 + e^2x). Four quotients share a reciprocal,
// since the unit that computes it is the one that exponentials wait for. Arguments end where tanh is 1 to its last bit.
template <int kCount>
__device__ __forceinline__ void cap_scores(float (&s)[kCount], float cap, float inner) {
#pragma unroll
  for (int i = 0; i < kCount; i += 4) {
    float a[4];
#pragma unroll
    for (int j = 0; j < 4; ++j) a[j] = 1.0f + exp2_approximate(fminf(s[i + j] * inner, 27.0f));
    const float first = a[0] * a[1], second = a[2] * a[3], both = reciprocal_approximate(first * second);
    const float halves[2] = {both * second, both * first};
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const float capped = cap - 2.0f * cap * (halves[j / 2] * a[j ^ 1]);
      s[i + j] =
          isnan(s[i + j]) ? s[i + j] : capped;  // the minimum has lost it, or the others would have got it
    }
  }
}

// What the options make of a score, in powers of two.
struct ForwardModifiers {
  float factor, cap, inner, slope;

  __device__ ForwardModifiers(const AttentionProblem& p, const AttentionSequence& s)
      : factor(p.scale * kLog2e),
        cap(p.soft_cap * kLog2e),
        inner(p.soft_cap > 0.0f ? p.scale / p.soft_cap * (2.0f * kLog2e) : 0.0f),
        slope(p.slopes ? p.slopes[s.index * p.slopes_batch + s.head * p.slopes_head] * kLog2e : 0.0f) {}

  // ahead[h]: how far row h's own place lies ahead of this thread's first column.
  template <int kCount>
  __device__ __forceinline__ void apply(float (&s)[kCount], const float (&ahead)[2]) const {
    if (cap > 0.0f) {
      cap_scores(s, cap, inner);
    } else {
#pragma unroll
      for (int i = 0; i < kCount; ++i) s[i] *= factor;
    }
    if (slope != 0.0f) {
#pragma unroll
      for (int i = 0; i < kCount; ++i)
        s[i] -= slope * fabsf(ahead[i / 2 % 2] - static_cast<float>(i / 4 * 8 + i % 2));
    }
  }
};

// The random words of a block's probabilities, which do not wait for its scores; `query` is row 0's, `key` the block's
// first.
template <int kTiles>
__device__ __forceinline__ void draw(uint32_t (&words)[kTiles][4], const DropoutBits& bits, int query,
                                     int key) {
#pragma unroll
  for (int i = 0; i < kTiles; ++i) bits.query_words(query, key + 16 * i, words[i]);
}

// Zeroes what they drop, with `keep` less than all.
template <int kTiles>
__device__ __forceinline__ void drop(float (&s)[8 * kTiles], const uint32_t (&words)[kTiles][4],
                                     int32_t keep) {
  const uint32_t limit = static_cast<uint32_t>(keep) << 16;
#pragma unroll
  for (int i = 0; i < 4 * kTiles; ++i) {  // the halves as upper halves: what is below them does not matter
    if (words[i / 4][i % 4] << 16 >= limit) s[2 * i] = 0.0f;
    if (words[i / 4][i % 4] >= limit) s[2 * i + 1] = 0.0f;
  }
}

// Rows of O to memory, 16 bytes a lane, and lse. A row that sees nothing is 0.
template <class T, int kDim>
__device__ __forceinline__ void store_rows(const AttentionProblem& p, const AttentionSequence& s, int query,
                                           const float (&o)[kDim / 2], const ForwardRows& rows) {
  const int t = lane() & 3;
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    const bool exists = query + 8 * h < s.queries;
    float sum = rows.sum[h], top = rows.shift[h], scale = p.keep_scale;
    sum += __shfl_xor_sync(kFullMask, sum, 1);
    sum += __shfl_xor_sync(kFullMask, sum, 2);
    // Where a key is seen, the highest score's probability is not 0.
    const uint32_t seen = sum == 0.0f ? 0u : 0xffffffffu;
    if (p.sinks) {  // one more score, that of no key
      const float sink = p.sinks[s.head] * kLog2e, highest = fmaxf(fmaxf(top, sink), -FLT_MAX);
      const float shrink = exp2_approximate(top - highest);
      sum = sum * shrink + exp2_approximate(sink - highest);
      top = highest, scale *= shrink;
    }
    scale = scale / sum;
    if (p.lse && exists && t == 0)
      lse_rows(p.lse, p, s)[query + 8 * h] = sum == 0.0f ? -INFINITY : (top + log2_approximate(sum)) * kLn2;
    T* to = query_rows<T>(p.out, s) + (query + 8 * h) * p.out.token;
#pragma unroll
    for (int j = 0; j < kDim / 8; j += 4) {
      uint32_t words[4];
#pragma unroll
      for (int b = 0; b < 4; ++b) {
        const int i = 4 * (j + b) + 2 * h;
        words[b] = pack_pair<T>(o[i] * scale, o[i + 1] * scale) & seen;
      }
      transpose_lanes<1>(t, words);
      const int column = 8 * (j + t);
      if (exists && column < p.head_dim)
        *reinterpret_cast<uint4*>(to + column) = make_uint4(words[0], words[1], words[2], words[3]);
    }
  }
}

}  // namespace gptcore::cuda
