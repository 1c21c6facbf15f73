// What the passes of Adafactor on CUDA know of tensors, and where a block of threads finds its chunk of them.
#pragma once

#include "core/cuda/four.cuh"
#include "core/cuda/step_control.cuh"
#include "kernels/adafactor/adafactor_body.h"
#include "kernels/adafactor/adafactor_tiles.h"

namespace gptcore::cuda {

// What 256 rows' or columns' states leave behind: the sum of R, or of g^2 / R / C, and the least R or C with a gradient.
struct AdafactorPartial {
  double sum, least;
};

// A tensor as the passes see it. Its matrices may be blocks of rows of one, the last of them shorter.
struct AdafactorItem {
  AdafactorTensor tensor;
  AdafactorTiling tiling;
  double decay;
  float* count;                     // of its updates; may be null
  AdafactorPartial* partials;       // (slices, factor_rows + factor_cols)
  double* means;                    // mean R of each matrix, or of the one that is cut into blocks
  double* update_sum;               // of squares of g / sqrt(V); NaN where it has to be summed by elements
  double* own;                      // what its owner tells of blocks goes there, first that of its first
  int64_t last_rows;                // of its last matrix
  int64_t first_chunk, first_task;  // of all tensors'
  int32_t number;                   // in the caller's lists
  bool aligned, held, blocks;
};

struct AdafactorControl {
  double factor;  // k, of the gradients
  bool skip;
};

// p = p * keep - scale * g / sqrt(V)
struct AdafactorScale {
  float keep, scale;
};

// Device memory that passes hand on.
struct AdafactorSums {
  const AdafactorItem* items;
  int count;
  double *grads, *params, *updates;  // of each chunk
  AdafactorControl* control;
  AdafactorScale* scales;  // of each tensor
};

// What a call has that is the same for all tensors, and what may not be.
struct AdafactorRates {
  DeviceNumber step_size, beta2, decay_factor;
  bool each_step_size, each_beta2;  // arrays of one for each tensor
  double added, mean_floor;         // eps1, to squares or to the mean of R
  double eps2, clip_threshold;      // infinity: none
  float root_limit, beta1;
  bool scale_parameter, scaled_decay, maximize;
};

__device__ __forceinline__ double read_each(const DeviceNumber& n, bool each, int i) {
  return each ? static_cast<const double*>(n.at)[i] : read_number(n);
}

__device__ __forceinline__ int64_t ceil_div(int64_t size, int64_t part) { return (size + part - 1) / part; }

// The item of chunk (or task) `which`: the last that begins there or before.
template <int64_t AdafactorItem::* first>
__device__ __forceinline__ const AdafactorItem& item_of(const AdafactorSums& a, int64_t which) {
  int low = 0, high = a.count;
  while (high - low > 1) {
    const int middle = (low + high) / 2;
    (a.items[middle].*first <= which ? low : high) = middle;
  }
  return a.items[low];
}

// Where a chunk lies in its tensor, and a thread in the chunk: its fours are `step` elements apart in a row.
struct ChunkPlace {
  int64_t slice, row_block, col_block, row, col;  // row, col: of its first element
  int64_t start, stride;                          // of elements
  int size;                                       // elements of a chunk that is not factored
  int rows, cols, group, groups, column, step;    // this thread: every `groups`-th row, from four columns on
  bool factored;

  // How many columns there are of the thread's four `f` of row r; none or less where it has none.
  __device__ __forceinline__ int valid(int r, int f = 0) const {
    const int in_row = factored ? cols : size - r * cols;
    return (in_row < cols ? in_row : cols) - column - f * step;
  }
  __device__ __forceinline__ int64_t at(int r, int f = 0) const {
    return start + r * stride + (column + f * step);
  }
};

__device__ __forceinline__ ChunkPlace place_of(const AdafactorItem& item, int64_t chunk) {
  const AdafactorTensor& t = item.tensor;
  const AdafactorTiling& tiling = item.tiling;
  const auto thread = static_cast<int>(threadIdx.x);
  ChunkPlace p{};
  p.factored = t.row_var != nullptr;
  p.group = thread / tiling.threads, p.groups = kTileThreads / tiling.threads;
  p.column = thread % tiling.threads * 4, p.step = tiling.threads * 4;
  chunk -= item.first_chunk;
  if (!p.factored) {
    p.start = chunk * kTileElements, p.stride = p.cols = 4 * kTileThreads;
    p.size = static_cast<int>(t.cols - p.start < kTileElements ? t.cols - p.start : kTileElements);
    p.rows = (p.size + p.cols - 1) / p.cols;
    return p;
  }
  p.col_block = chunk % tiling.col_blocks;
  p.row_block = chunk / tiling.col_blocks % tiling.row_blocks;
  p.slice = chunk / (tiling.col_blocks * tiling.row_blocks);
  p.row = p.row_block * tiling.rows, p.col = p.col_block * tiling.cols;
  p.start = (p.slice * t.rows + p.row) * t.cols + p.col, p.stride = t.cols;
  const int64_t rows = p.slice + 1 < t.slices ? t.rows : item.last_rows;
  p.rows = static_cast<int>(rows - p.row < tiling.rows ? rows - p.row : tiling.rows);
  p.cols = static_cast<int>(t.cols - p.col < tiling.cols ? t.cols - p.col : tiling.cols);
  return p;
}

}  // namespace gptcore::cuda
