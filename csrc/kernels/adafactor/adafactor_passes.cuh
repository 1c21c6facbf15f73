// The passes of Adafactor on CUDA over chunks of tensors. Sums go by chunks, which the shapes fix.
#pragma once

#include "core/cuda/four.cuh"
#include "core/cuda/step_control.cuh"
#include "kernels/adafactor/adafactor_body.h"
#include "kernels/adafactor/adafactor_tiles.h"

namespace gptcore::cuda {

// A tensor as the passes see it.
struct AdafactorItem {
  AdafactorTensor tensor;
  AdafactorTiling tiling;
  double decay;
  float* count;                     // of its updates; may be null
  double* row_means;                // (slices, factor_rows): sums of R, for its mean
  int64_t first_chunk, first_task;  // of all tensors'
  int32_t number;                   // in the caller's lists
  bool aligned;
};

// Device memory that passes hand on.
struct AdafactorSums {
  const AdafactorItem* items;
  int count;
  double *grads, *params, *updates;  // of each chunk
  struct AdafactorControl* control;
  struct AdafactorScale* scales;  // of each tensor
};

struct AdafactorControl {
  double factor;  // k, of the gradients
  bool skip;
};

// p = p * keep - scale * g / sqrt(V)
struct AdafactorScale {
  float keep, scale;
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

// Where a chunk lies in its tensor, and a thread in the chunk.
struct ChunkPlace {
  int64_t slice, row_block, col_block, row, col;  // row, col: of its first element
  int64_t start, stride;                          // of elements
  int64_t rest;                                   // elements of the tensor from the start on
  int rows, cols, group, groups, column;          // this thread: every `groups`-th row, four columns
  bool factored;

  // How many of this thread's four columns row r has, or less than none.
  __device__ __forceinline__ int64_t valid(int r) const {
    const int64_t in_row = factored ? cols : rest - r * stride;
    return (in_row < cols ? in_row : cols) - column;
  }
  __device__ __forceinline__ int64_t at(int r) const { return start + r * stride + column; }
};

__device__ __forceinline__ ChunkPlace place_of(const AdafactorItem& item, int64_t chunk) {
  const AdafactorTensor& t = item.tensor;
  const AdafactorTiling& tiling = item.tiling;
  const auto thread = static_cast<int>(threadIdx.x);
  ChunkPlace p{};
  p.factored = t.row_var != nullptr;
  p.group = thread / tiling.threads, p.groups = kTileThreads / tiling.threads;
  p.column = thread % tiling.threads * 4;
  chunk -= item.first_chunk;
  if (!p.factored) {
    p.start = chunk * kTileElements, p.stride = int64_t{4} * kTileThreads, p.rest = t.cols - p.start;
    p.cols = static_cast<int>(p.stride);
    const int64_t size = p.rest < kTileElements ? p.rest : kTileElements;
    p.rows = static_cast<int>((size + p.stride - 1) / p.stride);
    return p;
  }
  p.col_block = chunk % tiling.col_blocks;
  p.row_block = chunk / tiling.col_blocks % tiling.row_blocks;
  p.slice = chunk / (tiling.col_blocks * tiling.row_blocks);
  p.row = p.row_block * tiling.rows, p.col = p.col_block * tiling.cols;
  p.start = (p.slice * t.rows + p.row) * t.cols + p.col, p.stride = t.cols;
  p.rows = static_cast<int>(t.rows - p.row < tiling.rows ? t.rows - p.row : tiling.rows);
  p.cols = static_cast<int>(t.cols - p.col < tiling.cols ? t.cols - p.col : tiling.cols);
  return p;
}

// --- squares -----------------------------------------------------------------------------------------------

struct SquareSums {
  float cols[4];
  double grads, params;
};

// One row's four columns; returns their squares' sum.
template <bool whole>
__device__ __forceinline__ float take_row(const AdafactorTensor& t, int64_t at, int64_t n, bool params,
                                          SquareSums* sums) {
  const GradFour raw = load_grad<whole>(t.grad, t.bf16_grad, at, n);
  Four<float> p{};
  if (params) p = load_four<whole>(t.param + at, n);
  const Four<float> g = widened(raw, t.bf16_grad);
  float row = 0;
#pragma unroll
  for (int k = 0; k < 4; ++k) {
    const float square = g.at[k] * g.at[k];
    sums->cols[k] += square, row += square;
  }
  sums->grads += square_sum(g.at);
  if (params) sums->params += square_sum(p.at);
  return row;
}

// Shared memory: 32 doubles, then kTileSteps * 8 floats of rows by warps and 1,024 of columns by groups.
constexpr int kRowParts = static_cast<int>(kTileSteps) * kTileThreads / kWarp;
constexpr int64_t kSquareBytes = 32 * 8 + (kRowParts + 4 * kTileThreads) * 4;

// Adds up what the block's threads have of rows and columns.
__device__ __forceinline__ void store_sums(const AdafactorTensor& t, const AdafactorTiling& tiling,
                                           const ChunkPlace& p, const float* row_parts,
                                           const float* col_parts) {
  const int warps = tiling.threads / kWarp;
  float* const rows = t.row_sums + (p.slice * tiling.col_blocks + p.col_block) * t.rows + p.row;
  for (int r = static_cast<int>(threadIdx.x); r < p.rows; r += kTileThreads) {
    float sum = 0;
    for (int w = 0; w < warps; ++w) sum += row_parts[r * warps + w];
    rows[r] = sum;
  }
  float* const cols = t.col_sums + (p.slice * tiling.row_blocks + p.row_block) * t.cols + p.col;
  for (int c = static_cast<int>(threadIdx.x); c < p.cols; c += kTileThreads) {
    float sum = 0;
    for (int g = 0; g < p.groups; ++g) sum += col_parts[g * tiling.threads * 4 + c];
    cols[c] = sum;
  }
}

// Of each chunk the sums of g^2, and of p^2 where `params`; of factored ones by rows and columns.
static __global__ void __launch_bounds__(kTileThreads, 4) adafactor_squares(AdafactorSums a, bool params) {
  double* const room = shared_memory<double>();
  auto* const row_parts = reinterpret_cast<float*>(room + 32);
  float* const col_parts = row_parts + kRowParts;
  const AdafactorItem& item = item_of<&AdafactorItem::first_chunk>(a, blockIdx.x);
  const AdafactorTensor& t = item.tensor;
  const ChunkPlace p = place_of(item, blockIdx.x);
  const int warps = item.tiling.threads / kWarp, own = p.column / (4 * kWarp);
  SquareSums sums{};
#pragma unroll 2
  for (int r = p.group; r < p.rows; r += p.groups) {
    const int64_t n = p.valid(r), at = p.at(r);
    float row = item.aligned && n >= 4 ? take_row<true>(t, at, n, params, &sums)
                                       : take_row<false>(t, at, n, params, &sums);
    if (!p.factored) continue;
#pragma unroll
    for (int step = kWarp / 2; step > 0; step /= 2) row += __shfl_xor_sync(kFullMask, row, step);
    if (lane() == 0) row_parts[r * warps + own] = row;
  }
#pragma unroll
  for (int k = 0; k < 4; ++k) col_parts[static_cast<int>(threadIdx.x) * 4 + k] = sums.cols[k];
  __syncthreads();
  if (p.factored) store_sums(t, item.tiling, p, row_parts, col_parts);
  const double grads = block_sum(sums.grads, room);
  __syncthreads();
  const double squares = params ? block_sum(sums.params, room) : 0.0;
  if (threadIdx.x == 0) a.grads[blockIdx.x] = grads, a.params[blockIdx.x] = squares;
}

// --- states ------------------------------------------------------------------------------------------------

// 256 rows' or columns' states one step on; of rows also the sum.
static __global__ void __launch_bounds__(kFactorThreads)
    adafactor_states(AdafactorSums a, const __grid_constant__ AdafactorRates rates) {
  if (a.control->skip) return;
  const AdafactorItem& item = item_of<&AdafactorItem::first_task>(a, blockIdx.x);
  const AdafactorTensor& t = item.tensor;
  const AdafactorTiling& tiling = item.tiling;
  const int64_t tasks = tiling.factor_rows + tiling.factor_cols;
  const int64_t slice = (blockIdx.x - item.first_task) / tasks, task = (blockIdx.x - item.first_task) % tasks;
  const bool by_rows = task < tiling.factor_rows;
  const int64_t size = by_rows ? t.rows : t.cols, blocks = by_rows ? tiling.col_blocks : tiling.row_blocks;
  const int64_t i = (by_rows ? task : task - tiling.factor_rows) * kFactorThreads + threadIdx.x;
  const float* sums = (by_rows ? t.row_sums : t.col_sums) + slice * blocks * size;
  float* state = (by_rows ? t.row_var : t.col_var) + slice * size;
  double value = 0;
  if (i < size) {
    double sum = 0;
    for (int64_t b = 0; b < blocks; ++b) sum += static_cast<double>(sums[b * size + i]);
    const double k = a.control->factor, beta2 = read_each(rates.beta2, rates.each_beta2, item.number);
    const double mean = sum * (k * k / static_cast<double>(by_rows ? t.cols : t.rows));
    value = static_cast<double>(state[i]) * beta2 + (mean + rates.added) * (1.0 - beta2);
    state[i] = static_cast<float>(value);
  }
  if (!by_rows) return;
  value = block_sum(value, shared_memory<double>());
  if (threadIdx.x == 0) item.row_means[slice * tiling.factor_rows + task] = value;
}

// --- updates -----------------------------------------------------------------------------------------------

// What a thread multiplies gradients with: 1 / sqrt(C) of its columns, or what moves V on.
struct UpdateNumbers {
  float cols[4];
  float beta2, rest2, square_factor, added, root_limit;
};

struct Unscaled {
  Four<float> value, variance;  // g / sqrt(V), and V where it is not factored
};

template <bool whole>
__device__ __forceinline__ Unscaled unscaled(const AdafactorTensor& t, int64_t at, int64_t n,
                                             float row_factor, const UpdateNumbers& a) {
  const GradFour raw = load_grad<whole>(t.grad, t.bf16_grad, at, n);
  Unscaled u{};
  if (t.variance) u.variance = load_four<whole>(t.variance + at, n);
  const Four<float> g = widened(raw, t.bf16_grad);
#pragma unroll
  for (int k = 0; k < 4; ++k) {
    float root = a.cols[k] * row_factor;
    if (t.variance) {
      const float square = g.at[k] * g.at[k] * a.square_factor + a.added;
      u.variance.at[k] = u.variance.at[k] * a.beta2 + square * a.rest2;
      root = 1.0f / sqrtf(u.variance.at[k]);
    }
    root = root > a.root_limit ? a.root_limit : root;
    u.value.at[k] = whole || k < n ? g.at[k] * root : 0.0f;
  }
  return u;
}

template <bool whole>
__device__ __forceinline__ void write_row(const AdafactorTensor& t, int64_t at, int64_t n, const Unscaled& u,
                                          const AdafactorScale& s, float beta1) {
  Four<float> p = load_four<whole>(t.param + at, n), m{};
  if (t.exp_avg) m = load_four<whole>(t.exp_avg + at, n);
#pragma unroll
  for (int k = 0; k < 4; ++k) {
    float step = u.value.at[k] * s.scale;
    if (t.exp_avg) step = m.at[k] = m.at[k] * beta1 + step * (1.0f - beta1);
    p.at[k] = p.at[k] * s.keep - step;
  }
  if (t.exp_avg) store_four<whole>(t.exp_avg + at, m, n);
  if (t.variance) store_four<whole>(t.variance + at, u.variance, n);
  store_four<whole>(t.param + at, p, n);
  if (t.copy) store_four<whole>(t.copy + at, rounded<bf16>(p), n);
}

// 1 / sqrt(R / mean R) of the chunk's rows.
__device__ __forceinline__ void fill_row_factors(const AdafactorItem& item, const ChunkPlace& p,
                                                 double mean_floor, float* factors) {
  const int64_t parts = item.tiling.factor_rows;
  double sum = 0;
  for (int64_t i = lane(); i < parts; i += kWarp) sum += item.row_means[p.slice * parts + i];
  double mean = warp_sum(sum) / static_cast<double>(item.tensor.rows);
  mean = mean < mean_floor ? mean_floor : mean;
  const float* state = item.tensor.row_var + p.slice * item.tensor.rows + p.row;
  for (int r = static_cast<int>(threadIdx.x); r < p.rows; r += kTileThreads) {
    factors[r] = static_cast<float>(1.0 / sqrt(static_cast<double>(state[r]) / mean));
  }
}

// Shared memory: 32 doubles, then a chunk's rows.
constexpr int64_t kUpdateBytes = 32 * 8 + kTileSteps * (kTileThreads / 32) * 4;

// Sums the squares of g / sqrt(V) over each chunk, or writes the parameters.
template <bool write>
static __global__ void __launch_bounds__(kTileThreads, 3)
    adafactor_updates(AdafactorSums a, const __grid_constant__ AdafactorRates rates) {
  if (a.control->skip) return;
  double* const room = shared_memory<double>();
  auto* const row_factors = reinterpret_cast<float*>(room + 32);
  const AdafactorItem& item = item_of<&AdafactorItem::first_chunk>(a, blockIdx.x);
  const AdafactorTensor& t = item.tensor;
  const ChunkPlace p = place_of(item, blockIdx.x);
  const double k = a.control->factor, beta2 = read_each(rates.beta2, rates.each_beta2, item.number);
  UpdateNumbers n{{},
                  static_cast<float>(beta2),
                  static_cast<float>(1.0 - beta2),
                  static_cast<float>(k * k),
                  static_cast<float>(rates.added),
                  rates.root_limit};
  if (p.factored) {
    fill_row_factors(item, p, rates.mean_floor, row_factors);
    const float* state = t.col_var + p.slice * t.cols + p.col + p.column;
#pragma unroll
    for (int c = 0; c < 4; ++c) {
      if (p.column + c < p.cols) n.cols[c] = static_cast<float>(1.0 / sqrt(static_cast<double>(state[c])));
    }
    __syncthreads();
  }
  AdafactorScale scale{};
  if (write) scale = a.scales[item.number];
  double sum = 0;
  for (int r = p.group; r < p.rows; r += p.groups) {
    const int64_t valid = p.valid(r), at = p.at(r);
    const float row_factor = p.factored ? row_factors[r] : 0.0f;
    if (item.aligned && valid >= 4) {
      const Unscaled u = unscaled<true>(t, at, valid, row_factor, n);
      if (write) write_row<true>(t, at, valid, u, scale, rates.beta1);
      if (!write) sum += square_sum(u.value.at);
    } else if (valid > 0) {
      const Unscaled u = unscaled<false>(t, at, valid, row_factor, n);
      if (write) write_row<false>(t, at, valid, u, scale, rates.beta1);
      if (!write) sum += square_sum(u.value.at);
    }
  }
  if (write) return;
  sum = block_sum(sum, room);
  if (threadIdx.x == 0) a.updates[blockIdx.x] = sum;
}

}  // namespace gptcore::cuda
