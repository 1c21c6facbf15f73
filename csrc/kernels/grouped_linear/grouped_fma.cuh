// A tile of f32 products' sums by the ordinary arithmetic units: 128 x 128, 8 x 8 a thread, or 64 x 64, 4 x 4 a thread,
// where the larger would leave multiprocessors idle. An element's sum is the same chain in both. Operands lie across the
// depth in shared memory, 16 of it at a time, and the next are in registers before those are used up.
#pragma once

#include "kernels/grouped_linear/grouped_mma.cuh"

namespace gptcore::cuda {

// kPer: rows, and columns, of a thread: 8 or 4.
template <int kPer>
struct FmaTile {
  static constexpr int kThreads = 256,
                       kBlocks = kPer == 8 ? 1 : 3;  // of a multiprocessor, by their registers
  static constexpr int kSize = 16 * kPer, kDepth = 16, kStride = kSize + 4;
  static constexpr int kOperand = kDepth * kStride;  // numbers
  static constexpr int kBytes = 2 * 2 * kOperand * 4;
  static constexpr int kLoads = kSize * kDepth / 4 / kThreads;
  using Sums = float[kPer][kPer];
  using Ahead = Pack<float>[kLoads];
};

// Four neighbours along the operand's lines.
template <class Tile, bool kDepthLines>
__device__ __forceinline__ void load_ahead(const TileOperand<float>& operand, int k, int depth,
                                           typename Tile::Ahead& ahead) {
  constexpr int kRun = (kDepthLines ? Tile::kDepth : Tile::kSize) / 4;
#pragma unroll
  for (int i = 0; i < Tile::kLoads; ++i) {
    const int at = static_cast<int>(threadIdx.x) + i * Tile::kThreads, line = at / kRun, run = at % kRun * 4;
    const int across = kDepthLines ? line : run, along = k + (kDepthLines ? run : line);
    const float* from =
        operand.data + (kDepthLines ? across : along) * operand.stride + (kDepthLines ? along : across);
    const bool there = kDepthLines ? across < operand.count : along < depth;
    const int left = kDepthLines ? depth - along : operand.count - across;
    if (there && left >= 4 && operand.packed) {
      ahead[i] = *reinterpret_cast<const Pack<float>*>(from);
    } else {
#pragma unroll
      for (int j = 0; j < 4; ++j) ahead[i].at[j] = there && j < left ? from[j] : 0.0f;
    }
  }
}

template <class Tile, bool kDepthLines>
__device__ __forceinline__ void store_ahead(const typename Tile::Ahead& ahead, float* to) {
  constexpr int kRun = (kDepthLines ? Tile::kDepth : Tile::kSize) / 4;
#pragma unroll
  for (int i = 0; i < Tile::kLoads; ++i) {
    const int at = static_cast<int>(threadIdx.x) + i * Tile::kThreads, line = at / kRun, run = at % kRun * 4;
    if constexpr (kDepthLines) {
#pragma unroll
      for (int j = 0; j < 4; ++j) to[(run + j) * Tile::kStride + line] = ahead[i].at[j];
    } else {
      *reinterpret_cast<Pack<float>*>(to + line * Tile::kStride + run) = ahead[i];
    }
  }
}

// Which rows or columns are a thread's: four, and of eight the others 64 further, so that neighbours read neighbours.
__device__ __forceinline__ int fma_place(int thread, int i) { return thread * 4 + i % 4 + i / 4 * 64; }

template <int kPer>
__device__ __forceinline__ void multiply_stage(const float* stage, typename FmaTile<kPer>::Sums& sums) {
  using Tile = FmaTile<kPer>;
  const int row = static_cast<int>(threadIdx.x) / 16, column = static_cast<int>(threadIdx.x) % 16;
#pragma unroll 4
  for (int k = 0; k < Tile::kDepth; ++k) {
    const float *a = stage + k * Tile::kStride, *b = a + Tile::kOperand;
    float left[kPer], right[kPer];
#pragma unroll
    for (int i = 0; i < kPer; i += 4) {
      const Pack<float> x = *reinterpret_cast<const Pack<float>*>(a + fma_place(row, i));
      const Pack<float> y = *reinterpret_cast<const Pack<float>*>(b + fma_place(column, i));
#pragma unroll
      for (int j = 0; j < 4; ++j) left[i + j] = x.at[j], right[i + j] = y.at[j];
    }
#pragma unroll
    for (int i = 0; i < kPer; ++i) {
#pragma unroll
      for (int j = 0; j < kPer; ++j) sums[i][j] = fmaf(left[i], right[j], sums[i][j]);
    }
  }
}

template <int kPer, bool kALines, bool kBLines>
__device__ __forceinline__ void multiply_tile(const TileOperand<float>& a, const TileOperand<float>& b,
                                              int depth, float* room, typename FmaTile<kPer>::Sums& sums) {
  using Tile = FmaTile<kPer>;
  typename Tile::Ahead left, right;
  const int steps = (depth + Tile::kDepth - 1) / Tile::kDepth;
  if (steps > 0) load_ahead<Tile, kALines>(a, 0, depth, left), load_ahead<Tile, kBLines>(b, 0, depth, right);
  for (int step = 0; step < steps; ++step) {
    float* stage = room + step % 2 * 2 * Tile::kOperand;
    store_ahead<Tile, kALines>(left, stage), store_ahead<Tile, kBLines>(right, stage + Tile::kOperand);
    __syncthreads();
    if (step + 1 < steps) {
      load_ahead<Tile, kALines>(a, (step + 1) * Tile::kDepth, depth, left);
      load_ahead<Tile, kBLines>(b, (step + 1) * Tile::kDepth, depth, right);
    }
    multiply_stage<kPer>(stage, sums);
  }
  __syncthreads();  // the next tile may begin to fill
}

// Eight sums side by side for each row: two threads that are neighbours have four of them each, and exchange so that
// each ends with all eight of a run (of 8 x 8: of its row; of 4 x 4: of every second row).
template <int kPer>
__device__ __forceinline__ void store_tile(const TileOut<float>& out, typename FmaTile<kPer>::Sums& sums) {
  const int row = static_cast<int>(threadIdx.x) / 16, column = static_cast<int>(threadIdx.x) % 16;
  const bool odd = column % 2;
#pragma unroll
  for (int i = 0; i < kPer; i += 8 / kPer) {
    float values[8];
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      // Even threads keep the first run or row, odd ones the second.
      const float first = sums[i][j], second = kPer == 8 ? sums[i][(j + 4) % kPer] : sums[(i + 1) % kPer][j];
      const float given = __shfl_xor_sync(kFullMask, odd ? first : second, 1);
      values[j] = odd ? given : first;
      values[j + 4] = odd ? second : given;
    }
    out.put(fma_place(row, i + (kPer == 4 && odd)), column / 2 * 8 + (kPer == 8 && odd ? 64 : 0), values);
  }
}

// --- kernels ---------------------------------------------------------------------------------------------------

template <int kPer, bool kDepthLines>
__global__ void __launch_bounds__(FmaTile<kPer>::kThreads, FmaTile<kPer>::kBlocks)
    multiply_rows_fma(const GroupedRowsDevice a, const bool packed, const bool packed_out) {
  using Tile = FmaTile<kPer>;
  float* room = shared_memory<float>();
  const RowTiles<Tile::kSize> tiles(reinterpret_cast<int*>(room + Tile::kBytes / 4), a.offsets, a.experts,
                                    a.rows);
  const int64_t across = (a.width + Tile::kSize - 1) / Tile::kSize;
  for (int64_t t = blockIdx.x; t < tiles.count() * across; t += gridDim.x) {
    const auto [rows, column] = tile_of_group(tiles, t, across, Tile::kSize);
    const bool behind = rows.group == a.experts;
    const int64_t left = rows.end - rows.first, columns = a.width - column;
    const float* weight = static_cast<const float*>(a.weight) + (behind ? 0 : rows.group * a.depth * a.width);
    const TileOperand<float> in{static_cast<const float*>(a.in) + rows.first * a.in_stride, a.in_stride, left,
                                packed};
    const TileOperand<float> by{weight + (kDepthLines ? column * a.depth : column),
                                kDepthLines ? a.depth : a.width, columns, packed};
    typename Tile::Sums sums = {};
    multiply_tile<kPer, true, kDepthLines>(in, by, behind ? 0 : static_cast<int>(a.depth), room, sums);
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
    store_tile<kPer>(out, sums);
  }
}

template <int kPer>
__global__ void __launch_bounds__(FmaTile<kPer>::kThreads, FmaTile<kPer>::kBlocks)
    multiply_weight_fma(const GroupedWeightDevice a, const bool packed, const bool packed_out) {
  using Tile = FmaTile<kPer>;
  float* room = shared_memory<float>();
  const int64_t down = (a.outer + Tile::kSize - 1) / Tile::kSize,
                across = (a.inner + Tile::kSize - 1) / Tile::kSize;
  for (int64_t t = blockIdx.x; t < a.experts * down * across; t += gridDim.x) {
    const int64_t expert = t / (down * across), row = t % down * Tile::kSize,
                  column = t / down % across * Tile::kSize;
    const GroupRows group = rows_of_group(a.offsets, expert, a.experts, a.rows);
    if (a.accumulate && group.begin == group.end) continue;  // nothing to add
    const TileOperand<float> dy{static_cast<const float*>(a.dy) + group.begin * a.dy_stride + row,
                                a.dy_stride, a.outer - row, packed};
    const TileOperand<float> x{static_cast<const float*>(a.x) + group.begin * a.x_stride + column, a.x_stride,
                               a.inner - column, packed};
    typename Tile::Sums sums = {};
    multiply_tile<kPer, false, false>(dy, x, static_cast<int>(group.end - group.begin), room, sums);
    const TileOut<float> out{static_cast<float*>(a.dweight) + (expert * a.outer + row) * a.inner + column,
                             nullptr,
                             a.inner,
                             a.outer - row,
                             a.inner - column,
                             true,
                             false,
                             a.accumulate,
                             packed_out};
    store_tile<kPer>(out, sums);
  }
}

}  // namespace gptcore::cuda
