// A tile of 128 x 128 sums of 16-bit products by eight warps of 64 x 32, from sm_80 on: operands come through four
// stages of 32 along the depth, copied behind the products' back.
#pragma once

#include "core/cuda/mma.cuh"
#include "kernels/grouped_linear/grouped_tiles.cuh"

namespace gptcore::cuda {

// One operand of a tile, from its first row (or column) on. Lines run along the depth or across it.
template <class T>
struct TileOperand {
  const T* data;
  int64_t stride;  // of lines
  int count;       // rows (or columns) that are there, at most a tile's
  bool packed;     // lines may be read by 16 bytes

  __device__ TileOperand(const T* data, int64_t stride, int64_t count, bool packed)
      : data(data), stride(stride), count(count < 128 ? static_cast<int>(count) : 128), packed(packed) {}
};

struct MmaTile {
  static constexpr int kThreads = 256, kBlocks = 2;  // of a multiprocessor, by registers and shared memory
  static constexpr int kSize = 128, kDepth = 32, kStages = 4;
  static constexpr int kOperandBytes = kSize * kDepth * 2, kStageBytes = 2 * kOperandBytes;
  static constexpr int kBytes = kStages * kStageBytes;
  static constexpr int kWarpRows = 64, kWarpColumns = 32;  // of 2 x 4 warps
  using Sums = float[kWarpRows / 16][kWarpColumns / 8][4];
};

// dweight, whose operands both take more addresses than two blocks' registers hold.
struct MmaWeightTile : MmaTile {
  static constexpr int kBlocks = 1;
};

// 16 bytes of an operand into shared memory, of which `there` elements exist.
template <class T>
__device__ __forceinline__ void copy_chunk(unsigned char* to, const T* base, const T* from, int there,
                                           bool packed) {
  constexpr int kElements = kPackElements<T>;
  const int count = there < 0 ? 0 : there > kElements ? kElements : there;
  if (packed) {
    copy_async(to, count ? from : base, count * static_cast<int>(sizeof(T)));
    return;
  }
  T* const element = reinterpret_cast<T*>(to);
#pragma unroll 1  // what this path takes in registers the other would lack
  for (int i = 0; i < kElements; ++i) element[i] = i < count ? from[i] : T{};
}

// One stage of one operand, from depth k on; what is not there becomes zeros.
template <bool kDepthLines, class T>
__device__ __forceinline__ void copy_operand(const TileOperand<T>& operand, int k, int depth,
                                             unsigned char* to) {
  constexpr int kLine = kDepthLines ? MmaTile::kDepth : MmaTile::kSize, kChunks = kLine / 8;
  constexpr int kCopies = MmaTile::kOperandBytes / 16 / MmaTile::kThreads;
#pragma unroll
  for (int i = 0; i < kCopies; ++i) {
    const int at = static_cast<int>(threadIdx.x) + i * MmaTile::kThreads, line = at / kChunks,
              chunk = at % kChunks;
    const int across = kDepthLines ? line : chunk * 8, along = k + (kDepthLines ? chunk * 8 : line);
    const int lines =
        kDepthLines ? operand.count - across : depth - along;  // that are left, this one included
    const int left = kDepthLines ? depth - along : operand.count - across;
    const T* from =
        operand.data + (kDepthLines ? across : along) * operand.stride + (kDepthLines ? along : across);
    copy_chunk(to + swizzled<kLine * 2>(line, chunk), operand.data, from, lines > 0 ? left : 0,
               operand.packed);
  }
}

// Fragments of 16 rows by 16 of the depth from row `row`, depth `k` of a stage.
template <bool kDepthLines>
__device__ __forceinline__ void load_a(uint32_t (&a)[4], const unsigned char* tile, int row, int k) {
  if constexpr (kDepthLines) {
    load_matrices(a, tile + swizzled<MmaTile::kDepth * 2>(row + lane() % 16, k / 8 + lane() / 16));
  } else {
    load_matrices_transposed(
        a, tile + swizzled<MmaTile::kSize * 2>(k + lane() % 8 + lane() / 16 * 8, row / 8 + lane() / 8 % 2));
  }
}
// Of 16 columns: b[0], b[1] for the first eight, b[2], b[3] for the others.
template <bool kDepthLines>
__device__ __forceinline__ void load_b(uint32_t (&b)[4], const unsigned char* tile, int column, int k) {
  if constexpr (kDepthLines) {
    load_matrices(b, tile + swizzled<MmaTile::kDepth * 2>(column + lane() % 8 + lane() / 16 * 8,
                                                          k / 8 + lane() / 8 % 2));
  } else {
    load_matrices_transposed(b,
                             tile + swizzled<MmaTile::kSize * 2>(k + lane() % 16, column / 8 + lane() / 16));
  }
}

template <bool kALines, bool kBLines, class T>
__device__ __forceinline__ void multiply_stage(const unsigned char* stage, MmaTile::Sums& sums) {
  const int row = warp() / 4 * MmaTile::kWarpRows, column = warp() % 4 * MmaTile::kWarpColumns;
#pragma unroll
  for (int k = 0; k < MmaTile::kDepth; k += 16) {
    uint32_t a[MmaTile::kWarpRows / 16][4], b[4];
#pragma unroll
    for (int i = 0; i < MmaTile::kWarpRows / 16; ++i) load_a<kALines>(a[i], stage, row + 16 * i, k);
#pragma unroll
    for (int j = 0; j < MmaTile::kWarpColumns / 8; j += 2) {
      load_b<kBLines>(b, stage + MmaTile::kOperandBytes, column + 8 * j, k);
#pragma unroll
      for (int i = 0; i < MmaTile::kWarpRows / 16; ++i) {
        mma_16x8x16<T>(sums[i][j], a[i], b[0], b[1]);
        mma_16x8x16<T>(sums[i][j + 1], a[i], b[2], b[3]);
      }
    }
  }
}

// The sums over the whole depth, each one chain. `room` is MmaTile::kBytes; free again behind the next barrier.
template <bool kALines, bool kBLines, class T>
__device__ __forceinline__ void multiply_tile(const TileOperand<T>& a, const TileOperand<T>& b, int depth,
                                              unsigned char* room, MmaTile::Sums& sums) {
  const int steps = (depth + MmaTile::kDepth - 1) / MmaTile::kDepth;
  const auto fetch = [&](int step) {
    if (step < steps) {
      unsigned char* stage = room + step % MmaTile::kStages * MmaTile::kStageBytes;
      copy_operand<kALines>(a, step * MmaTile::kDepth, depth, stage);
      copy_operand<kBLines>(b, step * MmaTile::kDepth, depth, stage + MmaTile::kOperandBytes);
    }
    copy_async_commit();  // empty ones too, so that the count of groups left tells the stage
  };
#pragma unroll
  for (int step = 0; step < MmaTile::kStages - 1; ++step) fetch(step);
  for (int step = 0; step < steps; ++step) {
    copy_async_wait<MmaTile::kStages - 2>();
    __syncthreads();  // the stage is there for all, and all are done with the one before it
    fetch(step + MmaTile::kStages - 1);
    multiply_stage<kALines, kBLines, T>(room + step % MmaTile::kStages * MmaTile::kStageBytes, sums);
  }
  copy_async_wait<0>();
}

// The sums to where they belong, through shared memory, so that lines of 64 bytes are written.
template <class T>
__device__ __forceinline__ void store_tile(const TileOut<T>& out, unsigned char* room,
                                           const MmaTile::Sums& sums) {
  constexpr int kRows = 16, kStride = MmaTile::kWarpColumns + 8;  // eight rows' pairs in other banks
  float* own = reinterpret_cast<float*>(room) + warp() * kRows * kStride;
  const int row = warp() / 4 * MmaTile::kWarpRows, column = warp() % 4 * MmaTile::kWarpColumns;
#pragma unroll
  for (int i = 0; i < MmaTile::kWarpRows / kRows; ++i) {
#pragma unroll
    for (int j = 0; j < MmaTile::kWarpColumns / 8; ++j) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        float* to = own + (lane() / 4 + 8 * half) * kStride + 8 * j + lane() % 4 * 2;
        *reinterpret_cast<float2*>(to) = make_float2(sums[i][j][2 * half], sums[i][j][2 * half + 1]);
      }
    }
    __syncwarp();
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float values[8];
      const float* from = own + (lane() / 4 + 8 * half) * kStride + lane() % 4 * 8;
#pragma unroll
      for (int c = 0; c < 8; ++c) values[c] = from[c];
      out.put(row + kRows * i + lane() / 4 + 8 * half, column + lane() % 4 * 8, values);
    }
    __syncwarp();
  }
}

// --- kernels ---------------------------------------------------------------------------------------------------

template <bool kDepthLines, class T>
__global__ void __launch_bounds__(MmaTile::kThreads, MmaTile::kBlocks)
    multiply_rows_mma(const GroupedRowsDevice a, const bool packed, const bool packed_out) {
  unsigned char* room = shared_memory();
  const RowTiles<MmaTile::kSize> tiles(reinterpret_cast<int*>(room + MmaTile::kBytes), a.offsets, a.experts,
                                       a.rows);
  const int64_t across = (a.width + MmaTile::kSize - 1) / MmaTile::kSize;
  for (int64_t t = blockIdx.x; t < tiles.count() * across; t += gridDim.x) {
    const auto [rows, column] = tile_of_group(tiles, t, across, MmaTile::kSize);
    const bool behind = rows.group == a.experts;
    const int64_t left = rows.end - rows.first, columns = a.width - column, depth = behind ? 0 : a.depth;
    const T* weight = static_cast<const T*>(a.weight) + (behind ? 0 : rows.group * a.depth * a.width);
    const TileOperand<T> in{static_cast<const T*>(a.in) + rows.first * a.in_stride, a.in_stride, left,
                            packed};
    const TileOperand<T> by{weight + (kDepthLines ? column * a.depth : column),
                            kDepthLines ? a.depth : a.width, columns, packed};
    MmaTile::Sums sums = {};
    multiply_tile<true, kDepthLines>(in, by, static_cast<int>(depth), room, sums);
    __syncthreads();
    const char* bias = a.bias && !behind
                           ? static_cast<const char*>(a.bias) +
                                 (rows.group * a.width + column) * (a.f32_bias ? 4 : int64_t{sizeof(T)})
                           : nullptr;
    const TileOut<T> out{static_cast<T*>(a.out) + rows.first * a.out_stride + column,
                         bias,
                         a.out_stride,
                         left,
                         columns,
                         false,
                         a.f32_bias,
                         false,
                         packed_out};
    store_tile(out, room, sums);
    __syncthreads();
  }
}

template <class T>
__global__ void __launch_bounds__(MmaWeightTile::kThreads, MmaWeightTile::kBlocks)
    multiply_weight_mma(const GroupedWeightDevice a, const bool packed, const bool packed_out) {
  unsigned char* room = shared_memory();
  const int down = static_cast<int>((a.outer + MmaTile::kSize - 1) / MmaTile::kSize),
            across = static_cast<int>((a.inner + MmaTile::kSize - 1) / MmaTile::kSize);
  const int tiles = static_cast<int>(a.experts) * down * across;
  for (int t = static_cast<int>(blockIdx.x); t < tiles; t += static_cast<int>(gridDim.x)) {
    const int expert = t / (down * across), row = t % down * MmaTile::kSize,
              column = t / down % across * MmaTile::kSize;
    const GroupRows group = rows_of_group(a.offsets, expert, a.experts, a.rows);
    if (a.accumulate && group.begin == group.end) continue;  // nothing to add
    const TileOperand<T> dy{static_cast<const T*>(a.dy) + group.begin * a.dy_stride + row, a.dy_stride,
                            a.outer - row, packed};
    const TileOperand<T> x{static_cast<const T*>(a.x) + group.begin * a.x_stride + column, a.x_stride,
                           a.inner - column, packed};
    MmaTile::Sums sums = {};
    multiply_tile<false, false>(dy, x, static_cast<int>(group.end - group.begin), room, sums);
    __syncthreads();
    char* to = static_cast<char*>(a.dweight) +
               ((expert * a.outer + row) * a.inner + column) * (a.f32_out ? 4 : int64_t{sizeof(T)});
    const TileOut<T> out{to,        nullptr, a.inner,      a.outer - row, a.inner - column,
                         a.f32_out, false,   a.accumulate, packed_out};
    store_tile(out, room, sums);
    __syncthreads();
  }
}

}  // namespace gptcore::cuda
