// grouped_linear in bf16 on Hopper: which tiles there are, and what the copy engine reads for them. Rows of x and dy
// begin anywhere in a group; what a box holds of the next group is not stored (rows of a result) or made zero (depth).
#include "kernels/grouped_linear/grouped_sm90.h"
#include "kernels/grouped_linear/grouped_wgmma.cuh"

namespace gptcore::cuda {
namespace {

// y and dx: the tiles of all groups' rows, and of those behind the last.
struct RowWorks {
  GroupedRowsDevice a;
  bool packed_out;
  RowTiles<WgmmaTile::kRows> tiles;
  int64_t across;

  __device__ RowWorks(const GroupedRowsDevice& of, bool packed, int* room)
      : a(of),
        packed_out(packed),
        tiles(room, of.offsets, of.experts, of.rows),
        across((of.width + WgmmaTile::kColumns - 1) / WgmmaTile::kColumns) {}
  __device__ int64_t count() const { return tiles.count() * across; }
  __device__ TileWork at(int64_t t) const {
    const auto [rows, column] = tile_of_group(tiles, t, across, WgmmaTile::kColumns);
    const int64_t steps = rows.group == a.experts ? 0 : (a.depth + WgmmaTile::kDepth - 1) / WgmmaTile::kDepth;
    return {static_cast<int>(steps),      0,
            static_cast<int>(rows.first), static_cast<int>(column),
            static_cast<int>(rows.group), WgmmaTile::kDepth};
  }
  __device__ TileOut<bf16> out(int64_t t) const {
    const auto [rows, column] = tile_of_group(tiles, t, across, WgmmaTile::kColumns);
    const bool biased = a.bias && rows.group < a.experts;
    const int64_t at = rows.group * a.width + column;
    const void* bias = biased ? static_cast<const char*>(a.bias) + at * (a.f32_bias ? 4 : 2) : nullptr;
    return {static_cast<bf16*>(a.out) + rows.first * a.out_stride + column,
            bias,
            a.out_stride,
            rows.end - rows.first,
            a.width - column,
            false,
            a.f32_bias,
            false,
            packed_out};
  }
};

// dweight: the tiles of all experts' matrices, whose depth is the group's rows.
struct WeightWorks {
  GroupedWeightDevice a;
  bool packed_out;
  int64_t down, across;

  __device__ WeightWorks(const GroupedWeightDevice& of, bool packed)
      : a(of),
        packed_out(packed),
        down((of.outer + WgmmaTile::kRows - 1) / WgmmaTile::kRows),
        across((of.inner + WgmmaTile::kColumns - 1) / WgmmaTile::kColumns) {}
  __device__ int64_t count() const { return a.experts * down * across; }
  __device__ TileWork at(int64_t t) const {
    const GroupRows group = rows_of_group(a.offsets, t / (down * across), a.experts, a.rows);
    const int rows = static_cast<int>(group.end - group.begin);
    const int steps = rows == 0 && a.accumulate ? -1 : (rows + WgmmaTile::kDepth - 1) / WgmmaTile::kDepth;
    return {steps,
            static_cast<int>(group.begin),
            static_cast<int>(t % down * WgmmaTile::kRows),
            static_cast<int>(t / down % across * WgmmaTile::kColumns),
            0,
            rows - (steps - 1) * WgmmaTile::kDepth};
  }
  __device__ TileOut<bf16> out(int64_t t) const {
    const int64_t expert = t / (down * across), row = t % down * WgmmaTile::kRows,
                  column = t / down % across * WgmmaTile::kColumns;
    return {
        static_cast<char*>(a.dweight) + ((expert * a.outer + row) * a.inner + column) * (a.f32_out ? 4 : 2),
        nullptr,
        a.inner,
        a.outer - row,
        a.inner - column,
        a.f32_out,
        false,
        a.accumulate,
        packed_out};
  }
};

template <Major kB>
__global__ void __launch_bounds__(WgmmaTile::kThreads, 1)
    rows_wgmma(const __grid_constant__ OperandMaps maps, const GroupedRowsDevice a, const bool packed_out) {
  const Stages stages(shared_memory());
  const RowWorks works(a, packed_out, reinterpret_cast<int*>(stages.room + WgmmaTile::kBytes));
  run_tiles<Major::k, kB>(maps, works, stages);
}

__global__ void __launch_bounds__(WgmmaTile::kThreads, 1)
    weight_wgmma(const __grid_constant__ OperandMaps maps, const GroupedWeightDevice a,
                 const bool packed_out) {
  run_tiles<Major::mn, Major::mn>(maps, WeightWorks(a, packed_out), Stages(shared_memory()));
}

Launch launch_of(int64_t tiles, int64_t more_shared_bytes) {
  const int64_t at_once = limits().multiprocessors;
  return {dim3(static_cast<unsigned>(tiles < at_once ? tiles : at_once)), dim3(WgmmaTile::kThreads),
          WgmmaTile::kBytes + more_shared_bytes};
}

// Boxes of 64 elements along the lines of (lines, length), `count` lines each, or of such matrices of all experts.
TensorBoxes boxes_of(const void* data, int64_t length, int64_t lines, int64_t stride, int count,
                     int64_t experts = 0) {
  TensorBoxes boxes{
      data,           DType::bf16, experts ? 3 : 2, {length, lines, experts}, {1, stride, lines * stride},
      {64, count, 1}, 128};
  return boxes;
}

bool make_maps(const TensorBoxes& a, const TensorBoxes& b, OperandMaps* maps) {
  if (unfit_for_tensor_map(a) || unfit_for_tensor_map(b)) return false;
  maps->a = tensor_map(a), maps->b = tensor_map(b);
  return true;
}

bool fits(const Launch& l, int64_t rows) {
  return limits().arch == 90 && l.shared_bytes <= limits().shared_bytes && rows <= INT32_MAX - 256;
}

}  // namespace

bool multiply_rows_sm90(const GroupedRowsDevice& a, bool packed_out) {
  using Tiles = RowTiles<WgmmaTile::kRows>;
  const int64_t across = (a.width + WgmmaTile::kColumns - 1) / WgmmaTile::kColumns;
  const Launch l = launch_of(Tiles::most(a.experts, a.rows) * across, Tiles::shared_bytes(a.experts));
  OperandMaps maps;
  if (a.rows == 0 || !fits(l, a.rows)) return false;
  const TensorBoxes in = boxes_of(a.in, a.depth, a.rows, a.in_stride, WgmmaTile::kRows);
  if (a.depth_lines) {
    if (!make_maps(in, boxes_of(a.weight, a.depth, a.width, a.depth, WgmmaTile::kColumns, a.experts),
                   &maps)) {
      return false;
    }
    launch<&rows_wgmma<Major::k>>(l, maps, a, packed_out);
  } else {
    if (!make_maps(in, boxes_of(a.weight, a.width, a.depth, a.width, WgmmaTile::kDepth, a.experts), &maps)) {
      return false;
    }
    launch<&rows_wgmma<Major::mn>>(l, maps, a, packed_out);
  }
  return true;
}

bool multiply_weight_sm90(const GroupedWeightDevice& a, bool packed_out) {
  const int64_t down = (a.outer + WgmmaTile::kRows - 1) / WgmmaTile::kRows,
                across = (a.inner + WgmmaTile::kColumns - 1) / WgmmaTile::kColumns;
  const Launch l = launch_of(a.experts * down * across, 0);
  OperandMaps maps;
  if (a.rows == 0 || !fits(l, a.rows) ||
      !make_maps(boxes_of(a.dy, a.outer, a.rows, a.dy_stride, WgmmaTile::kDepth),
                 boxes_of(a.x, a.inner, a.rows, a.x_stride, WgmmaTile::kDepth, 1), &maps)) {
    return false;
  }
  launch<&weight_wgmma>(l, maps, a, packed_out);
  return true;
}

}  // namespace gptcore::cuda
