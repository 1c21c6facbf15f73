// The two products of attention's forward for one warp, by mma.sync from swizzled tiles: S = Q K^T and O += P V.
//
// x[r][j] is the fragment of row tile r (16 rows) with keys 8 j to 8 j + 7; o[r][n] that with elements 8 n to 8 n + 7.
// Lane g = lane / 4, t = lane % 4 holds columns 2 t and 2 t + 1 of rows g ([0], [1]) and g + 8 ([2], [3]).
#pragma once

#include "core/cuda/in_place.cuh"
#include "kernels/attention/attention_operands.cuh"

namespace gptcore::cuda {

// T: f32, tf32, bf16 or f16; rows of kDim elements.
template <class T, int kDim>
struct AttentionProducts {
  static constexpr int kRowBytes = kDim * static_cast<int>(sizeof(T));
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
      Operands<T, 4> a[kRowTiles];
#pragma unroll
      for (int r = 0; r < kRowTiles; ++r) {
        uint32_t bits[4];
        load_matrices(bits, queries + swizzled<kRowBytes>(row + 16 * r + lane % 16, chunk + lane / 16));
        a[r] = operands<T>(bits);
      }
#pragma unroll
      for (int j = 0; j < kKeys / 8; j += 2) {
        const int key = 8 * j + lane % 8 + lane / 16 * 8;
        uint32_t bits[4];
        load_matrices(bits, keys + swizzled<kRowBytes>(key, chunk + lane / 8 % 2));
        const Operands<T, 4> b = operands<T>(bits);
#pragma unroll
        for (int r = 0; r < kRowTiles; ++r) {
          multiply_add(x[r][j], a[r], b, 0);
          multiply_add(x[r][j + 1], a[r], b, 2);
        }
      }
    }
  }

  // o += P V, P being x, rounded to T.
  template <int kRowTiles, int kKeys>
  __device__ static __forceinline__ void values(const float (&x)[kRowTiles][kKeys / 8][4],
                                                const unsigned char* values,
                                                float (&o)[kRowTiles][kDim / 8][4]) {
    if constexpr (sizeof(T) == 2) {
      values_16<kRowTiles, kKeys>(x, values, o);
    } else {
      values_32<kRowTiles, kKeys>(x, values, o);
    }
  }

 private:
  template <int kRowTiles, int kKeys>
  __device__ static __forceinline__ void values_16(const float (&x)[kRowTiles][kKeys / 8][4],
                                                   const unsigned char* values,
                                                   float (&o)[kRowTiles][kDim / 8][4]) {
    const int lane = in_place(gptcore::cuda::lane());
#pragma unroll
    for (int j = 0; j < kKeys / 8; j += 2) {
      Operands<T, 4> a[kRowTiles];
#pragma unroll
      for (int r = 0; r < kRowTiles; ++r) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const float* pair = &x[r][j + i / 2][2 * (i % 2)];
          a[r].set(i, pack_pair<T>(pair[0], pair[1]));
        }
      }
#pragma unroll
      for (int n = 0; n < kDim / 8; n += 2) {
        uint32_t bits[4];
        load_matrices_transposed(bits, values + swizzled<kRowBytes>(8 * j + lane % 16, n + lane / 16));
        const Operands<T, 4> b = operands<T>(bits);
#pragma unroll
        for (int r = 0; r < kRowTiles; ++r) {
          multiply_add(o[r][n], a[r], b, 0);
          multiply_add(o[r][n + 1], a[r], b, 2);
        }
      }
    }
  }

  // Depth t of a product stands for key 2 t and t + 4 for key 2 t + 1, so that scores are operands as they lie, and the
  // values that a warp reads at once lie in different banks.
  template <int kRowTiles, int kKeys>
  __device__ static __forceinline__ void values_32(const float (&x)[kRowTiles][kKeys / 8][4],
                                                   const unsigned char* values,
                                                   float (&o)[kRowTiles][kDim / 8][4]) {
    const int g = lane() / 4, t = lane() % 4;
#pragma unroll
    for (int j = 0; j < kKeys / 8; ++j) {
      Operands<T, 4> a[kRowTiles];
#pragma unroll
      for (int r = 0; r < kRowTiles; ++r) {
#pragma unroll
        for (int i = 0; i < 4; ++i) a[r].set(i, __float_as_uint(x[r][j][i % 2 * 2 + i / 2]));
      }
#pragma unroll
      for (int n = 0; n < kDim / 8; ++n) {
        Operands<T, 2> b;
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          const int at = swizzled<kRowBytes>(8 * j + 2 * t + i, 2 * n + g / 4) + 4 * (g % 4);
          b.set(i, *reinterpret_cast<const uint32_t*>(values + at));
        }
#pragma unroll
        for (int r = 0; r < kRowTiles; ++r) multiply_add(o[r][n], a[r], b, 0);
      }
    }
  }
};

}  // namespace gptcore::cuda
