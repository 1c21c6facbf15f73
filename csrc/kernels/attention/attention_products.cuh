// The two products of attention's forward for one warp, by mma.sync from swizzled tiles: S = Q K^T and O += P V. f32
// operands are split into two tf32 parts, and the three products that count are summed, the small ones first.
//
// x[r][j] is the fragment of row tile r (16 rows) with keys 8 j to 8 j + 7; o[r][n] that with elements 8 n to 8 n + 7.
// Lane g = lane / 4, t = lane % 4 holds columns 2 t and 2 t + 1 of rows g ([0], [1]) and g + 8 ([2], [3]).
#pragma once

#include "core/cuda/convert.cuh"
#include "core/cuda/in_place.cuh"
#include "core/cuda/launch.cuh"
#include "core/cuda/mma.cuh"

namespace gptcore::cuda {

// An f32 number as a sum of two that mma_16x8x8_tf32 takes; an infinity's second part is nothing.
struct SplitFloat {
  uint32_t high, low;
};
__device__ __forceinline__ SplitFloat split_float(float x) {
  const uint32_t high = to_tf32(x);
  const float rest = x - __uint_as_float(high);
  return {high, __float_as_uint(rest == rest ? rest : 0.0f)};
}
template <int kCount>
__device__ __forceinline__ void split_floats(const uint32_t (&x)[kCount], uint32_t (&high)[kCount],
                                             uint32_t (&low)[kCount]) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    const SplitFloat s = split_float(__uint_as_float(x[i]));
    high[i] = s.high, low[i] = s.low;
  }
}

// T: f32, bf16 or f16; rows of kDim elements.
template <class T, int kDim>
struct AttentionProducts {
  static constexpr int kRowBytes = kDim * static_cast<int>(sizeof(T));
  static constexpr bool kSplit = sizeof(T) == 4;
  static constexpr int kDepthSteps = kRowBytes > 512 ? 1 : 4;  // unrolled

  // x = Q K^T of kRowTiles row tiles, of the query tile's rows from `row` on, with kKeys keys.
  template <int kRowTiles, int kKeys>
  __device__ static __forceinline__ void scores(const unsigned char* queries, int row,
                                                const unsigned char* keys,
                                                float (&x)[kRowTiles][kKeys / 8][4]) {
#pragma unroll
    for (int r = 0; r < kRowTiles; ++r) {
#pragma unroll
      for (int j = 0; j < kKeys / 8; ++j) x[r][j][0] = x[r][j][1] = x[r][j][2] = x[r][j][3] = 0.0f;
    }
    const int lane = in_place(gptcore::cuda::lane());
#pragma unroll kDepthSteps
    for (int chunk = 0; chunk < kRowBytes / 16; chunk += 2) {
      uint32_t a[kRowTiles][4], a_low[kRowTiles][4];
#pragma unroll
      for (int r = 0; r < kRowTiles; ++r) {
        load_matrices(a[r], queries + swizzled<kRowBytes>(row + 16 * r + lane % 16, chunk + lane / 16));
        if constexpr (kSplit) split_floats(a[r], a[r], a_low[r]);
      }
#pragma unroll
      for (int j = 0; j < kKeys / 8; j += 2) {
        uint32_t b[4];
        load_matrices(b, keys + swizzled<kRowBytes>(8 * j + lane % 8 + lane / 16 * 8, chunk + lane / 8 % 2));
        if constexpr (kSplit) {
          uint32_t b_low[4];
          split_floats(b, b, b_low);
#pragma unroll
          for (int r = 0; r < kRowTiles; ++r) {
            multiply_split(x[r][j], a[r], a_low[r], b[0], b[1], b_low[0], b_low[1]);
            multiply_split(x[r][j + 1], a[r], a_low[r], b[2], b[3], b_low[2], b_low[3]);
          }
        } else {
#pragma unroll
          for (int r = 0; r < kRowTiles; ++r) {
            mma_16x8x16<T>(x[r][j], a[r], b[0], b[1]);
            mma_16x8x16<T>(x[r][j + 1], a[r], b[2], b[3]);
          }
        }
      }
    }
  }

  // o += P V, P being x, rounded to T.
  template <int kRowTiles, int kKeys>
  __device__ static __forceinline__ void values(const float (&x)[kRowTiles][kKeys / 8][4],
                                                const unsigned char* values,
                                                float (&o)[kRowTiles][kDim / 8][4]) {
    if constexpr (kSplit) {
      values_split<kRowTiles, kKeys>(x, values, o);
    } else {
      const int lane = in_place(gptcore::cuda::lane());
#pragma unroll
      for (int j = 0; j < kKeys / 8; j += 2) {
        uint32_t a[kRowTiles][4];
#pragma unroll
        for (int r = 0; r < kRowTiles; ++r) {
#pragma unroll
          for (int i = 0; i < 4; ++i)
            a[r][i] = pack_pair<T>(x[r][j + i / 2][2 * (i % 2)], x[r][j + i / 2][2 * (i % 2) + 1]);
        }
#pragma unroll
        for (int n = 0; n < kDim / 8; n += 2) {
          uint32_t b[4];
          load_matrices_transposed(b, values + swizzled<kRowBytes>(8 * j + lane % 16, n + lane / 16));
#pragma unroll
          for (int r = 0; r < kRowTiles; ++r) {
            mma_16x8x16<T>(o[r][n], a[r], b[0], b[1]);
            mma_16x8x16<T>(o[r][n + 1], a[r], b[2], b[3]);
          }
        }
      }
    }
  }

 private:
  __device__ static __forceinline__ void multiply_split(float (&d)[4], const uint32_t (&a)[4],
                                                        const uint32_t (&a_low)[4], uint32_t b0, uint32_t b1,
                                                        uint32_t low0, uint32_t low1) {
    mma_16x8x8_tf32(d, a_low, b0, b1);
    mma_16x8x8_tf32(d, a, low0, low1);
    mma_16x8x8_tf32(d, a, b0, b1);
  }

  // Depth t of a product stands for key 2 t and t + 4 for key 2 t + 1, so that scores are operands as they lie, and the
  // values that a warp reads at once lie in different banks.
  template <int kRowTiles, int kKeys>
  __device__ static __forceinline__ void values_split(const float (&x)[kRowTiles][kKeys / 8][4],
                                                      const unsigned char* values,
                                                      float (&o)[kRowTiles][kDim / 8][4]) {
    const int g = lane() / 4, t = lane() % 4;
#pragma unroll
    for (int j = 0; j < kKeys / 8; ++j) {
      uint32_t a[kRowTiles][4], a_low[kRowTiles][4];
#pragma unroll
      for (int r = 0; r < kRowTiles; ++r) {
#pragma unroll
        for (int i = 0; i < 4; ++i) a[r][i] = __float_as_uint(x[r][j][i % 2 * 2 + i / 2]);
        split_floats(a[r], a[r], a_low[r]);
      }
#pragma unroll
      for (int n = 0; n < kDim / 8; ++n) {
        uint32_t b[2], b_low[2];
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          const int at = swizzled<kRowBytes>(8 * j + 2 * t + i, 2 * n + g / 4) + 4 * (g % 4);
          b[i] = *reinterpret_cast<const uint32_t*>(values + at);
        }
        split_floats(b, b, b_low);
#pragma unroll
        for (int r = 0; r < kRowTiles; ++r)
          multiply_split(o[r][n], a[r], a_low[r], b[0], b[1], b_low[0], b_low[1]);
      }
    }
  }
};

}  // namespace gptcore::cuda
