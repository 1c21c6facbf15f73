// A tile of 128 x 128 sums of f32 products by the ordinary arithmetic units, 8 x 8 a thread: operands lie across the
// depth in shared memory, 16 of it at a time, and the next are in registers before those are used up.
#pragma once

#include "kernels/grouped_linear/grouped_mma.cuh"

namespace gptcore::cuda {

struct FmaTile {
  static constexpr int kThreads = 256, kBlocks = 1;  // of a multiprocessor, by their registers
  static constexpr int kSize = 128, kDepth = 16, kStride = kSize + 4;
  static constexpr int kOperand = kDepth * kStride;  // numbers
  static constexpr int kBytes = 2 * 2 * kOperand * 4;
  static constexpr int kLoads = kSize * kDepth / 4 / kThreads;
  using Sums = float[8][8];
  using Ahead = Pack<float>[kLoads];
};

// Four neighbours along the operand's lines.
template <bool kDepthLines>
__device__ __forceinline__ void load_ahead(const TileOperand<float>& operand, int64_t k, int64_t depth,
                                           FmaTile::Ahead& ahead) {
  constexpr int kRun = (kDepthLines ? FmaTile::kDepth : FmaTile::kSize) / 4;
#pragma unroll
  for (int i = 0; i < FmaTile::kLoads; ++i) {
    const int at = static_cast<int>(threadIdx.x) + i * FmaTile::kThreads, line = at / kRun,
              run = at % kRun * 4;
    const int64_t across = kDepthLines ? line : run, along = k + (kDepthLines ? run : line);
    const float* from =
        operand.data + (kDepthLines ? across * operand.stride + along : along * operand.stride + across);
    const bool there = kDepthLines ? across < operand.count : along < depth;
    const int64_t left = kDepthLines ? depth - along : operand.count - across;
    if (there && left >= 4 && operand.packed) {
      ahead[i] = *reinterpret_cast<const Pack<float>*>(from);
    } else {
#pragma unroll
      for (int j = 0; j < 4; ++j) ahead[i].at[j] = there && j < left ? from[j] : 0.0f;
    }
  }
}

template <bool kDepthLines>
__device__ __forceinline__ void store_ahead(const FmaTile::Ahead& ahead, float* to) {
  constexpr int kRun = (kDepthLines ? FmaTile::kDepth : FmaTile::kSize) / 4;
#pragma unroll
  for (int i = 0; i < FmaTile::kLoads; ++i) {
    const int at = static_cast<int>(threadIdx.x) + i * FmaTile::kThreads, line = at / kRun,
              run = at % kRun * 4;
    if constexpr (kDepthLines) {
#pragma unroll
      for (int j = 0; j < 4; ++j) to[(run + j) * FmaTile::kStride + line] = ahead[i].at[j];
    } else {
      *reinterpret_cast<Pack<float>*>(to + line * FmaTile::kStride + run) = ahead[i];
    }
  }
}

// Which eight rows or columns are a thread's: four, and four 64 further, so that neighbours read neighbours.
__device__ __forceinline__ int fma_place(int thread, int i) { return thread * 4 + i % 4 + i / 4 * 64; }

__device__ __forceinline__ void multiply_stage(const float* stage, FmaTile::Sums& sums) {
  const int row = static_cast<int>(threadIdx.x) / 16, column = static_cast<int>(threadIdx.x) % 16;
#pragma unroll 4
  for (int k = 0; k < FmaTile::kDepth; ++k) {
    const float *a = stage + k * FmaTile::kStride, *b = a + FmaTile::kOperand;
    float left[8], right[8];
#pragma unroll
    for (int i = 0; i < 8; i += 4) {
      const Pack<float> x = *reinterpret_cast<const Pack<float>*>(a + fma_place(row, i));
      const Pack<float> y = *reinterpret_cast<const Pack<float>*>(b + fma_place(column, i));
#pragma unroll
      for (int j = 0; j < 4; ++j) left[i + j] = x.at[j], right[i + j] = y.at[j];
    }
#pragma unroll
    for (int i = 0; i < 8; ++i) {
#pragma unroll
      for (int j = 0; j < 8; ++j) sums[i][j] = fmaf(left[i], right[j], sums[i][j]);
    }
  }
}

template <bool kALines, bool kBLines>
__device__ __forceinline__ void multiply_tile(const TileOperand<float>& a, const TileOperand<float>& b,
                                              int64_t depth, float* room, FmaTile::Sums& sums) {
  FmaTile::Ahead left, right;
  const int64_t steps = (depth + FmaTile::kDepth - 1) / FmaTile::kDepth;
  if (steps > 0) load_ahead<kALines>(a, 0, depth, left), load_ahead<kBLines>(b, 0, depth, right);
  for (int64_t step = 0; step < steps; ++step) {
    float* stage = room + step % 2 * 2 * FmaTile::kOperand;
    store_ahead<kALines>(left, stage), store_ahead<kBLines>(right, stage + FmaTile::kOperand);
    __syncthreads();
    if (step + 1 < steps) {
      load_ahead<kALines>(a, (step + 1) * FmaTile::kDepth, depth, left);
      load_ahead<kBLines>(b, (step + 1) * FmaTile::kDepth, depth, right);
    }
    multiply_stage(stage, sums);
  }
  __syncthreads();  // the next tile may begin to fill
}

// Sums lie as eight columns in two runs of four; a run's neighbour is another thread's.
__device__ __forceinline__ void store_tile(const TileOut<float>& out, FmaTile::Sums& sums) {
  const int row = static_cast<int>(threadIdx.x) / 16, column = static_cast<int>(threadIdx.x) % 16;
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    float values[8];
#pragma unroll
    for (int j = 0; j < 4; ++j) {  // even columns of threads put the first runs of both, odd ones the second
      const bool odd = column % 2;
      const float given = __shfl_xor_sync(kFullMask, odd ? sums[i][j] : sums[i][j + 4], 1);
      values[j] = odd ? given : sums[i][j];
      values[j + 4] = odd ? sums[i][j + 4] : given;
    }
    out.put(fma_place(row, i), column / 2 * 8 + column % 2 * 64, values);
  }
}

// --- kernels ---------------------------------------------------------------------------------------------------

template <bool kDepthLines>
__global__ void __launch_bounds__(FmaTile::kThreads, FmaTile::kBlocks)
    multiply_rows_fma(const GroupedRowsDevice a, const bool packed, const bool packed_out) {
  float* room = shared_memory<float>();
  const RowTiles<FmaTile::kSize> tiles(reinterpret_cast<int*>(room + FmaTile::kBytes / 4), a.offsets,
                                       a.experts, a.rows);
  const int64_t across = (a.width + FmaTile::kSize - 1) / FmaTile::kSize;
  for (int64_t t = blockIdx.x; t < tiles.count() * across; t += gridDim.x) {
    const auto [rows, column] = tile_of_group(tiles, t, across, FmaTile::kSize);
    const bool behind = rows.group == a.experts;
    const int64_t left = rows.end - rows.first, columns = a.width - column;
    const float* weight = static_cast<const float*>(a.weight) + (behind ? 0 : rows.group * a.depth * a.width);
    const TileOperand<float> in{static_cast<const float*>(a.in) + rows.first * a.in_stride, a.in_stride, left,
                                packed};
    const TileOperand<float> by{weight + (kDepthLines ? column * a.depth : column),
                                kDepthLines ? a.depth : a.width, columns, packed};
    FmaTile::Sums sums = {};
    multiply_tile<true, kDepthLines>(in, by, behind ? 0 : a.depth, room, sums);
    const float* bias =
        a.bias && !behind ? static_cast<const float*>(a.bias) + rows.group * a.width + column : nullptr;
    const TileOut<float> out{static_cast<float*>(a.out) + rows.first * a.out_stride + column,
                             bias,
                             a.out_stride,
                             left,
                             columns,
                             true,
                             true,
                             false,
                             packed_out};
    store_tile(out, sums);
  }
}

__global__ void __launch_bounds__(FmaTile::kThreads, FmaTile::kBlocks)
    multiply_weight_fma(const GroupedWeightDevice a, const bool packed, const bool packed_out) {
  float* room = shared_memory<float>();
  const int64_t down = (a.outer + FmaTile::kSize - 1) / FmaTile::kSize,
                across = (a.inner + FmaTile::kSize - 1) / FmaTile::kSize;
  for (int64_t t = blockIdx.x; t < a.experts * down * across; t += gridDim.x) {
    const int64_t expert = t / (down * across), row = t % down * FmaTile::kSize,
                  column = t / down % across * FmaTile::kSize;
    const GroupRows group = rows_of_group(a.offsets, expert, a.experts, a.rows);
    if (a.accumulate && group.begin == group.end) continue;  // nothing to add
    const TileOperand<float> dy{static_cast<const float*>(a.dy) + group.begin * a.dy_stride + row,
                                a.dy_stride, a.outer - row, packed};
    const TileOperand<float> x{static_cast<const float*>(a.x) + group.begin * a.x_stride + column, a.x_stride,
                               a.inner - column, packed};
    FmaTile::Sums sums = {};
    multiply_tile<false, false>(dy, x, group.end - group.begin, room, sums);
    const TileOut<float> out{static_cast<float*>(a.dweight) + (expert * a.outer + row) * a.inner + column,
                             nullptr,
                             a.inner,
                             a.outer - row,
                             a.inner - column,
                             true,
                             false,
                             a.accumulate,
                             packed_out};
    store_tile(out, sums);
  }
}

}  // namespace gptcore::cuda
