// The online softmax of a warp's rows, on fragments of scores in registers. Scores are in powers of two.
#pragma once

#include "core/cuda/approximate.cuh"
#include "core/cuda/launch.cuh"
#include "kernels/attention/attention_scores.cuh"

namespace gptcore::cuda {

// How far, in powers of two, scores may exceed the shift before the sums so far are rescaled. Probabilities then reach
// 2^8, far from any type's limits, and most tiles after the first need no rescaling.
constexpr float kSoftmaxSlack = 8.0f;

// Rows g and g + 8 of kRowTiles row tiles: the shift that is subtracted, and this lane's part of the sum.
template <int kRowTiles>
struct OnlineSoftmax {
  float shift[kRowTiles][2], sum[kRowTiles][2];

  // `sink`: a score, times log2(e), that counts but leads to no value; -inf for none.
  __device__ __forceinline__ void start(float sink) {
#pragma unroll
    for (int r = 0; r < kRowTiles; ++r) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        shift[r][i] = sink;
        sum[r][i] = sink != -INFINITY && lane() % 4 == 0 ? 1.0f : 0.0f;
      }
    }
  }

  // Makes probabilities, but for a power of two that all of a row share, of scores that lack `factor` (above 0), and
  // brings the sums so far, o among them, to the same.
  template <int kBlocks, int kSums>
  __device__ __forceinline__ void step(float (&x)[kRowTiles][kBlocks][4], float factor,
                                       float (&o)[kRowTiles][kSums][4]) {
    float top[kRowTiles][2];
    bool above = false;
#pragma unroll
    for (int r = 0; r < kRowTiles; ++r) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        float most = fmaxf(x[r][0][2 * i], x[r][0][2 * i + 1]);
#pragma unroll
        for (int j = 1; j < kBlocks; ++j) most = fmaxf(most, fmaxf(x[r][j][2 * i], x[r][j][2 * i + 1]));
        most = fmaxf(most, __shfl_xor_sync(kFullMask, most, 1));
        most = fmaxf(most, __shfl_xor_sync(kFullMask, most, 2));
        top[r][i] = most * factor;
        above |= top[r][i] > shift[r][i] + kSoftmaxSlack;
      }
    }
    if (__any_sync(kFullMask, above)) rescale(top, o);
#pragma unroll
    for (int r = 0; r < kRowTiles; ++r) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const float minus = shift[r][i] == -INFINITY ? 0.0f : -shift[r][i];
        float part = 0.0f;
#pragma unroll
        for (int j = 0; j < kBlocks; ++j) {
#pragma unroll
          for (int c = 2 * i; c < 2 * i + 2; ++c) {
            x[r][j][c] = exp2_approximate(__fmaf_rn(x[r][j][c], factor, minus));
            part += x[r][j][c];
          }
        }
        sum[r][i] += part;
      }
    }
  }

  // The sums of whole rows, in every lane of a row.
  __device__ __forceinline__ void finish() {
#pragma unroll
    for (int r = 0; r < kRowTiles; ++r) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        sum[r][i] += __shfl_xor_sync(kFullMask, sum[r][i], 1);
        sum[r][i] += __shfl_xor_sync(kFullMask, sum[r][i], 2);
      }
    }
  }
  // Of a finished row.
  __device__ __forceinline__ float lse(int r, int i) const {
    return sum[r][i] == 0.0f ? -INFINITY : shift[r][i] * kLn2 + logf(sum[r][i]);
  }

 private:
  template <int kSums>
  __device__ __forceinline__ void rescale(const float (&top)[kRowTiles][2], float (&o)[kRowTiles][kSums][4]) {
#pragma unroll
    for (int r = 0; r < kRowTiles; ++r) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        if (!(top[r][i] > shift[r][i] + kSoftmaxSlack)) continue;
        const float by = exp2_approximate(shift[r][i] - top[r][i]);
        shift[r][i] = top[r][i], sum[r][i] *= by;
#pragma unroll
        for (int n = 0; n < kSums; ++n) o[r][n][2 * i] *= by, o[r][n][2 * i + 1] *= by;
      }
    }
  }
};

}  // namespace gptcore::cuda
