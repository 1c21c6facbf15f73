// A warp's products of tiles in shared memory, in 16-bit types and in f32, split or as plain tf32.
#pragma once

#include "core/cuda/launch.cuh"
#include "core/cuda/mma.cuh"
#include "kernels/attention/attention_operands.cuh"

namespace gptcore::cuda::backward_mma {

// Which way the depth of a product runs through an operand's rows in shared memory.
enum class Depth { along_rows, down_rows };

// Sums of kRows x kColumns fragments of 16 x 8.
template <int kRows, int kColumns>
struct Sums {
  static constexpr int kCount = 4 * kRows * kColumns;
  float at[kRows][kColumns][4];

  // As they lie in registers: by rows of fragments, then columns.
  __device__ __forceinline__ float (&flat()) [kCount] { return *reinterpret_cast<float (*)[kCount]>(&at); }

  __device__ __forceinline__ void clear() {
#pragma unroll
    for (int i = 0; i < kCount; ++i) flat()[i] = 0.0f;
  }
};

// --- 16-bit types ----------------------------------------------------------------------------------------------

template <Depth depth, int kPitch, class T>
__device__ __forceinline__ void load_rows_16(uint32_t (&a)[4], const T* tile) {
  const int l = lane();
  if constexpr (depth == Depth::along_rows) {
    load_matrices(a, tile + (l & 15) * kPitch + (l >> 4) * 8);
  } else {
    load_matrices_transposed(a, tile + ((l & 7) + (l >> 4) * 8) * kPitch + (l >> 3 & 1) * 8);
  }
}
// Two neighbours of 8 columns: b[0], b[1] of the first and b[2], b[3] of the second; or the first alone.
template <Depth depth, int kPitch, class T, int kCount>
__device__ __forceinline__ void load_columns_16(uint32_t (&b)[kCount], const T* tile) {
  const int l = kCount == 2 ? lane() & 15 : lane();
  if constexpr (depth == Depth::along_rows) {
    load_matrices(b, tile + ((l & 7) + (l >> 4) * 8) * kPitch + (l >> 3 & 1) * 8);
  } else {
    load_matrices_transposed(b, tile + (l & 15) * kPitch + (l >> 4) * 8);
  }
}

// sums += a b, of depth kDepth; a and b point at the warp's first row and column at depth 0.
template <int kDepth, Depth a_depth, int kPitchA, Depth b_depth, int kPitchB, class T, int kRows,
          int kColumns>
__device__ __forceinline__ void multiply_16(Sums<kRows, kColumns>& sums, const T* a, const T* b) {
#pragma unroll(kDepth > 128 ? 4 : 8)
  for (int k = 0; k < kDepth; k += 16) {
    uint32_t rows[kRows][4];
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      const T* at = a_depth == Depth::along_rows ? a + 16 * i * kPitchA + k : a + k * kPitchA + 16 * i;
      load_rows_16<a_depth, kPitchA>(rows[i], at);
    }
#pragma unroll
    for (int j = 0; j < kColumns; j += 2) {
      const T* at = b_depth == Depth::along_rows ? b + 8 * j * kPitchB + k : b + k * kPitchB + 8 * j;
      uint32_t columns[4];
      if (j + 1 < kColumns) {
        load_columns_16<b_depth, kPitchB>(columns, at);
      } else {
        uint32_t last[2];
        load_columns_16<b_depth, kPitchB>(last, at);
        columns[0] = last[0], columns[1] = last[1];
      }
#pragma unroll
      for (int i = 0; i < kRows; ++i) {
        mma_16x8x16<T>(sums.at[i][j], rows[i], columns[0], columns[1]);
        if (j + 1 < kColumns)
          mma_16x8x16<T>(sums.at[i][j + 1 < kColumns ? j + 1 : j], rows[i], columns[2], columns[3]);
      }
    }
  }
}

// --- f32 and tf32 ----------------------------------------------------------------------------------------------

// Element (place, depth) of an operand's fragment.
template <Depth depth, int kPitch, class T>
__device__ __forceinline__ uint32_t bits_at(const T* tile, int place, int k) {
  return __float_as_uint(
      to_float(depth == Depth::along_rows ? tile[place * kPitch + k] : tile[k * kPitch + place]));
}

template <int kDepth, Depth a_depth, int kPitchA, Depth b_depth, int kPitchB, class T, int kRows,
          int kColumns>
__device__ __forceinline__ void multiply_32(Sums<kRows, kColumns>& sums, const T* a, const T* b) {
  const int g = lane() / 4, t = lane() % 4;
#pragma unroll 2
  for (int k = 0; k < kDepth; k += 8) {
    Operands<T, 4> rows[kRows];
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
#pragma unroll
      for (int e = 0; e < 4; ++e)
        rows[i].set(e, bits_at<a_depth, kPitchA>(a, 16 * i + g + e % 2 * 8, k + t + e / 2 * 4));
    }
#pragma unroll
    for (int j = 0; j < kColumns; ++j) {
      Operands<T, 2> column;
#pragma unroll
      for (int e = 0; e < 2; ++e) column.set(e, bits_at<b_depth, kPitchB>(b, 8 * j + g, k + t + 4 * e));
#pragma unroll
      for (int i = 0; i < kRows; ++i) multiply_add(sums.at[i][j], rows[i], column, 0);
    }
  }
}

template <int kDepth, Depth a_depth, int kPitchA, Depth b_depth, int kPitchB, class T, int kRows,
          int kColumns>
__device__ __forceinline__ void multiply(Sums<kRows, kColumns>& sums, const T* a, const T* b) {
  if constexpr (sizeof(T) == 4) {
    multiply_32<kDepth, a_depth, kPitchA, b_depth, kPitchB>(sums, a, b);
  } else {
    multiply_16<kDepth, a_depth, kPitchA, b_depth, kPitchB>(sums, a, b);
  }
}

}  // namespace gptcore::cuda::backward_mma
