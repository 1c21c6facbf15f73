// Which tile of which group a block works on, from offsets that only the device knows, and how a tile's results are
// written.
#pragma once

#include "core/cuda/launch.cuh"
#include "core/cuda/pack.cuh"
#include "kernels/grouped_linear/grouped_device.h"

namespace gptcore::cuda {

// A group's rows; offsets that fall or leave the tensor are cut to it.
struct GroupRows {
  int64_t begin, end;
};
__device__ __forceinline__ GroupRows rows_of_group(const int32_t* offsets, int64_t group, int64_t groups,
                                                   int64_t rows) {
  const auto cut = [&](int64_t r) { return r < 0 ? 0 : r < rows ? r : rows; };
  const int64_t begin = cut(offsets[group]), end = group == groups ? rows : cut(offsets[group + 1]);
  return {begin, end < begin ? begin : end};
}

// Row tiles of all groups; the rows behind the last one are a group more.
struct RowTile {
  int64_t group, first, end;  // rows
};

template <int kRows>
class RowTiles {
 public:
  static int64_t shared_bytes(int64_t groups) { return (groups + 2 + 32) * 4; }
  // Row tiles there can be at most.
  static int64_t most(int64_t groups, int64_t rows) { return (rows + kRows - 1) / kRows + groups + 1; }

  // All threads of the block come; ends with a barrier. `room` is shared_bytes().
  __device__ RowTiles(int* room, const int32_t* offsets, int64_t groups, int64_t rows)
      : starts_(room + 32), offsets_(offsets), groups_(static_cast<int>(groups)), rows_(rows) {
    const int threads = static_cast<int>(blockDim.x), all = groups_ + 1, part = (all + threads - 1) / threads;
    const int begin = static_cast<int>(threadIdx.x) * part, end = begin + part < all ? begin + part : all;
    int own = 0;
    for (int g = begin; g < end; ++g) own += tiles_of(g);
    int before = own;
    for (int step = 1; step < kWarp; step *= 2) {
      const int from = __shfl_up_sync(kFullMask, before, static_cast<unsigned>(step));
      before += lane() >= step ? from : 0;
    }
    if (lane() == kWarp - 1) room[warp()] = before;
    __syncthreads();
    before -= own;
    for (int w = 0; w < warp(); ++w) before += room[w];
    if (threadIdx.x == 0) starts_[0] = 0;
    for (int g = begin; g < end; ++g) before += tiles_of(g), starts_[g + 1] = before;
    __syncthreads();
  }

  __device__ int count() const { return starts_[groups_ + 1]; }
  __device__ int64_t groups() const { return groups_; }

  __device__ RowTile at(int tile) const {
    int low = 0, high = groups_;
    while (low < high) {  // the last group that starts at or before the tile
      const int middle = (low + high + 1) / 2;
      if (starts_[middle] <= tile) {
        low = middle;
      } else {
        high = middle - 1;
      }
    }
    const GroupRows group = rows_of_group(offsets_, low, groups_, rows_);
    return {low, group.begin + int64_t{kRows} * (tile - starts_[low]), group.end};
  }
  // A group's first tile, and how many it has.
  __device__ int first_of(int64_t group) const { return starts_[group]; }
  __device__ int tiles_in(int64_t group) const { return starts_[group + 1] - starts_[group]; }

 private:
  __device__ int tiles_of(int group) const {
    const GroupRows rows = rows_of_group(offsets_, group, groups_, rows_);
    return static_cast<int>((rows.end - rows.begin + kRows - 1) / kRows);
  }

  int* starts_;
  const int32_t* offsets_;
  int groups_;
  int64_t rows_;
};

// Blocks take tiles in turn: all of a group's row tiles by one column tile, then the next column.
struct TileOfGroup {
  RowTile rows;
  int64_t column;
};
template <int kRows>
__device__ __forceinline__ TileOfGroup tile_of_group(const RowTiles<kRows>& tiles, int64_t index,
                                                     int64_t across, int columns) {
  const RowTile any = tiles.at(static_cast<int>(index / across));
  const int64_t first = int64_t{tiles.first_of(any.group)} * across, within = index - first;
  const int down = tiles.tiles_in(any.group);
  const int64_t row = within % down;
  const RowTile rows = tiles.at(static_cast<int>(tiles.first_of(any.group) + row));
  return {rows, within / down * columns};
}

// One tile's place in the result, and what is done to a sum before it lies there.
template <class T>
struct TileOut {
  void* out;  // of the tile's first element
  const void* bias;
  int64_t stride, rows, columns;  // that are there, from the first on
  bool f32_out, f32_bias, accumulate;
  bool packed;  // 8 results from a multiple of 8 columns on may be written by packs

  template <class To>
  __device__ __forceinline__ void write(To* to, float (&values)[8], int64_t column) const {
    if (packed && column + 8 <= columns) {
      constexpr int kRun = kPackElements<To>;
#pragma unroll
      for (int i = 0; i < 8; i += kRun) {
        float run[kRun];
        if (accumulate) {
          load_pack(to + i, run);
#pragma unroll
          for (int j = 0; j < kRun; ++j) values[i + j] += run[j];
        }
#pragma unroll
        for (int j = 0; j < kRun; ++j) run[j] = values[i + j];
        store_pack(to + i, run);
      }
      return;
    }
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      if (column + i < columns) to[i] = from_float<To>(accumulate ? to_float(to[i]) + values[i] : values[i]);
    }
  }

  // Eight sums of one row, from a multiple of 8 columns on.
  __device__ __forceinline__ void put(int64_t row, int64_t column, float (&values)[8]) const {
    if (row >= rows || column >= columns) return;
    if (bias) {
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        if (column + i >= columns) continue;
        values[i] += f32_bias ? static_cast<const float*>(bias)[column + i]
                              : to_float(static_cast<const T*>(bias)[column + i]);
      }
    }
    if (f32_out) {
      write(static_cast<float*>(out) + row * stride + column, values, column);
    } else {
      write(static_cast<T*>(out) + row * stride + column, values, column);
    }
  }
};

}  // namespace gptcore::cuda
