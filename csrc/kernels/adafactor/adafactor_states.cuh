// The states of factored matrices on CUDA, and what follows from them: mean R and, from sums over columns, RMS(U).
//
//   sum_ij U_ij^2 = mean R * sum_j D_j / C_j          D_j = sum_i g_ij^2 / R_i
//
// It does not know the limit of 1 / sqrt(V): where the least R and C with a gradient do not clear it, U is summed by
// elements.
#pragma once

#include "kernels/adafactor/adafactor_rows.cuh"

namespace gptcore::cuda {

__device__ __forceinline__ double warp_least(double x) {
#pragma unroll
  for (int step = kWarp / 2; step > 0; step /= 2) x = fmin(x, __shfl_xor_sync(kFullMask, x, step));
  return x;
}
// Over the block, as block_sum; room behind that one's.
__device__ __forceinline__ double block_least(double x, double* room) {
  const int warps = static_cast<int>(blockDim.x) / kWarp;
  x = warp_least(x);
  if (lane() == 0) room[warp()] = x;
  __syncthreads();
  return warp_least(lane() < warps ? room[lane()] : INFINITY);
}

// Shared memory of kernels that make both of a block.
constexpr int64_t kStateBytes = 2 * 32 * 8;

// What moves states on: of sums of `size` squares.
struct StateRule {
  double beta2, square_factor, added;
};
__device__ __forceinline__ StateRule state_rule(const AdafactorSums& a, const AdafactorRates& rates,
                                                int number, int64_t size) {
  const double k = a.control->factor;
  return {read_each(rates.beta2, rates.each_beta2, number), k * k / static_cast<double>(size), rates.added};
}

// One row's or column's state moved on; in f64: what follows from it enters every element.
__device__ __forceinline__ double move_state(float* state, double sum, const StateRule& rule) {
  const double mean = sum * rule.square_factor;
  const double value = static_cast<double>(*state) * rule.beta2 + (mean + rule.added) * (1.0 - rule.beta2);
  *state = static_cast<float>(value);
  return value;
}

__device__ __forceinline__ double sum_of_blocks(const float* sums, int64_t count, int64_t stride) {
  double sum = 0;
  for (int64_t b = 0; b < count; ++b) sum += static_cast<double>(sums[b * stride]);
  return sum;
}

// 256 rows' or columns' states one step on.
static __global__ void __launch_bounds__(kFactorThreads)
    adafactor_states(AdafactorSums a, const __grid_constant__ AdafactorRates rates) {
  if (a.control->skip) return;
  const AdafactorItem& item = item_of<&AdafactorItem::first_task>(a, blockIdx.x);
  const AdafactorTensor& t = item.tensor;
  const AdafactorTiling& tiling = item.tiling;
  const int64_t tasks = tiling.factor_rows + tiling.factor_cols, here = blockIdx.x - item.first_task;
  const int64_t slice = here / tasks, task = here % tasks;
  const bool by_rows = task < tiling.factor_rows;
  const int64_t size = by_rows ? t.rows : t.cols, blocks = by_rows ? tiling.col_blocks : tiling.row_blocks;
  const int64_t i = (by_rows ? task : task - tiling.factor_rows) * kFactorThreads + threadIdx.x;
  const int64_t at = slice * blocks * size + i;
  double sum = 0, least = INFINITY;
  if (i < size) {
    float* const state = (by_rows ? t.row_var : t.col_var) + slice * size + i;
    const double squares = sum_of_blocks((by_rows ? t.row_sums : t.col_sums) + at, blocks, size);
    const StateRule rule = state_rule(a, rates, item.number, by_rows ? t.cols : t.rows);
    const double value = move_state(state, squares, rule);
    if (squares > 0) least = value;
    if (by_rows) sum = value;
    if (!by_rows && item.held && value > kLeastMean)
      sum = sum_of_blocks(t.ratio_sums + at, blocks, size) / value;
  }
  double* const room = shared_memory<double>();
  sum = block_sum(sum, room), least = block_least(least, room + 32);
  if (threadIdx.x == 0) item.partials[here] = {sum, least};
}

// Partial sums of one matrix's rows or columns, joined by a warp.
__device__ __forceinline__ AdafactorPartial joined(const AdafactorPartial* parts, int64_t count) {
  double sum = 0, least = INFINITY;
  for (int64_t i = lane(); i < count; i += kWarp) sum += parts[i].sum, least = fmin(least, parts[i].least);
  return {warp_sum(sum), warp_least(least)};
}

// The sum over a matrix of squares of g / sqrt(V) from its sums, or infinity where the limit may hold.
__device__ __forceinline__ double update_sum_of(double mean, const AdafactorPartial& rows,
                                                const AdafactorPartial& cols, float root_limit) {
  const bool clears = sqrt(rows.least * cols.least / mean) * static_cast<double>(root_limit) >= 1.001;
  return clears ? mean * cols.sum : INFINITY;
}

// A block for each tensor, a warp for each of its matrices: mean R, and the sum of squares of g / sqrt(V).
static __global__ void __launch_bounds__(kFactorThreads)
    adafactor_means(AdafactorSums a, const __grid_constant__ AdafactorRates rates) {
  if (a.control->skip) return;
  const AdafactorItem& item = a.items[blockIdx.x];
  const AdafactorTensor& t = item.tensor;
  const int64_t rows = item.tiling.factor_rows, cols = item.tiling.factor_cols;
  double updates = 0;
  for (int64_t slice = warp(); slice < t.slices && t.row_var; slice += kFactorThreads / kWarp) {
    const AdafactorPartial* const parts = item.partials + slice * (rows + cols);
    const AdafactorPartial by_rows = joined(parts, rows), by_cols = joined(parts + rows, cols);
    const double mean = fmax(by_rows.sum / static_cast<double>(t.rows), rates.mean_floor);
    if (lane() == 0) item.means[slice] = mean;
    updates += update_sum_of(mean, by_rows, by_cols, rates.root_limit);
  }
  updates = block_sum(lane() == 0 ? updates : 0.0, shared_memory<double>());
  if (threadIdx.x == 0) *item.update_sum = item.held && isfinite(updates) ? updates : NAN;
}

}  // namespace gptcore::cuda
