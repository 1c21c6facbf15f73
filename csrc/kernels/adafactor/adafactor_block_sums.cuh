// Sums by blocks on CUDA, for slices of wholes with several owners: what an owner tells of its blocks, and what all make of
// those of all owners. Blocks add up in f64 in an order that the shape of the whole fixes.
#pragma once

#include "kernels/adafactor/adafactor_blocks_body.h"
#include "kernels/adafactor/adafactor_scales.cuh"
#include "kernels/adafactor/adafactor_states.cuh"
#include "kernels/adafactor/adafactor_updates.cuh"

namespace gptcore::cuda {

// A whole of which there is a slice here; lists as in adafactor_blocks.h, of all blocks.
struct AdafactorWhole {
  const double *statistics, *sums;
  double* totals;
  float* col_var;
  double decay;
  int64_t size, rows, cols, matrices, blocks, width;  // blocks: of one matrix, or of all that is not factored
  int64_t first_task;                                 // of columns, 256 of one matrix each
  bool factored;
};

struct AdafactorWholes {
  const AdafactorWhole* at;
  int count;
  AdafactorPartial* partials;  // of each task
};

// --- 1: statistics of own blocks -------------------------------------------------------------------------------------

// Rows and chunks of block `which` of an item.
struct BlockPlace {
  int64_t rows, row_blocks, chunk, chunks;
};
__device__ __forceinline__ BlockPlace block_of(const AdafactorItem& item, int64_t which) {
  const AdafactorTiling& tiling = item.tiling;
  const int64_t rows = which + 1 < item.tensor.slices ? item.tensor.rows : item.last_rows;
  const int row_blocks = (static_cast<int>(rows + tiling.rows) - 1) / static_cast<int>(tiling.rows);
  return {rows, row_blocks, item.first_chunk + which * tiling.row_blocks * tiling.col_blocks,
          row_blocks * tiling.col_blocks};
}

// Moves R of a block's rows on: their sum, the least with a gradient, and the sum of p^2 behind the columns' sums.
__device__ __forceinline__ void block_rows(const AdafactorSums& a, const AdafactorItem& item, int64_t which,
                                           const BlockPlace& b, const StateRule& rule, double* room,
                                           double* out) {
  const AdafactorTensor& t = item.tensor;
  const int64_t col_blocks = item.tiling.col_blocks;
  const float* const sums = t.row_sums + which * t.rows * col_blocks;
  double total = 0, least = INFINITY;
  for (int64_t i = threadIdx.x; i < b.rows; i += kFactorThreads) {
    const double sum = sum_of_blocks(sums + i, col_blocks, t.rows);
    const double value = move_state(t.row_var + which * t.rows + i, sum, rule);
    total += value;
    if (sum > 0) least = fmin(least, value);
  }
  total = block_sum(total, room), least = block_least(least, room + 32);
  __syncthreads();
  const double params = sum_of(a.params, b.chunk, b.chunk + b.chunks, room);
  if (threadIdx.x == 0) out[0] = total, out[1] = least, out[2] = params;
}

// Of each block one task for its rows, and one for every 256 columns.
static __global__ void __launch_bounds__(kFactorThreads)
    block_statistics(AdafactorSums a, const __grid_constant__ AdafactorRates rates) {
  if (a.control->skip) return;
  const AdafactorItem& item = item_of<&AdafactorItem::first_task>(a, blockIdx.x);
  const AdafactorTensor& t = item.tensor;
  const StateRule rule = state_rule(a, rates, item.number, t.cols);
  const auto tasks = static_cast<int>(1 + item.tiling.factor_cols);
  const auto here = static_cast<int>(blockIdx.x - item.first_task);
  const int which = here / tasks, task = here % tasks;
  const BlockPlace b = block_of(item, which);
  double* const out = item.own + which * (2 * t.cols + 3);
  if (task == 0) {
    block_rows(a, item, which, b, rule, shared_memory<double>(), out + 2 * t.cols);
    return;
  }
  const int64_t i = int64_t{task - 1} * kFactorThreads + threadIdx.x;
  if (i >= t.cols) return;
  const int64_t at = int64_t{which} * item.tiling.row_blocks * t.cols + i;
  out[i] = sum_of_blocks(t.col_sums + at, b.row_blocks, t.cols);
  out[t.cols + i] = item.held ? sum_of_blocks(t.ratio_sums + at, b.row_blocks, t.cols) : 0.0;
}

constexpr int64_t kFlatWarps = kFactorThreads / kWarp;

// Of what is not factored a warp for each block: the sums of p^2 and of (g / sqrt(V))^2.
static __global__ void __launch_bounds__(kFactorThreads)
    flat_statistics(AdafactorSums a, int64_t first, const __grid_constant__ AdafactorRates rates) {
  if (a.control->skip) return;
  const int64_t task = first + blockIdx.x;
  const AdafactorItem& item = item_of<&AdafactorItem::first_task>(a, task);
  const AdafactorTensor& t = item.tensor;
  const int64_t which = (task - item.first_task) * kFlatWarps + warp();
  if (which * kFlatBlock >= t.cols) return;
  const UpdateNumbers numbers = update_numbers(a, rates, item.number);
  double params = 0, updates = 0;
#pragma unroll 2
  for (int f = 0; f < kFlatBlock / (4 * kWarp); ++f) {
    const int64_t at = which * kFlatBlock + (f * kWarp + lane()) * 4;
    const int n = t.cols - at < 4 ? static_cast<int>(t.cols - at) : 4;
    const bool whole = item.aligned && n == 4;
    UpdateFour x = whole ? load_update<true, false>(t, at, n) : load_update<false, false>(t, at, n);
    const Four<float> p = whole ? load_four<true>(t.param + at, n) : load_four<false>(t.param + at, n);
    updates += square_sum(unscaled<false>(t, &x, n, 0.0f, nullptr, numbers).at);
    params += square_sum(p.at);
  }
  params = warp_sum(params), updates = warp_sum(updates);
  if (lane() != 0) return;
  double* const out = item.own + which * 2;
  out[0] = rates.scale_parameter ? params : 0.0;
  out[1] = rates.clip_threshold < INFINITY ? updates : 0.0;
}

// --- 2: of all blocks ------------------------------------------------------------------------------------------------

// 256 columns' states of one matrix one step on.
static __global__ void __launch_bounds__(kFactorThreads)
    block_columns(AdafactorSums a, AdafactorWholes w, const __grid_constant__ AdafactorRates rates) {
  if (a.control->skip) return;
  int which = 0;
  for (int high = w.count; high - which > 1;) {
    const int middle = (which + high) / 2;
    (w.at[middle].first_task <= blockIdx.x ? which : high) = middle;
  }
  const AdafactorWhole& whole = w.at[which];
  const int64_t tasks = ceil_div(whole.cols, kFactorThreads), here = blockIdx.x - whole.first_task;
  const int64_t matrix = here / tasks, i = here % tasks * kFactorThreads + threadIdx.x;
  double ratio = 0, least = INFINITY;
  if (i < whole.cols) {
    const double* at = whole.statistics + matrix * whole.blocks * whole.width + i;
    double sum = 0;
    for (int64_t b = 0; b < whole.blocks; ++b, at += whole.width) sum += at[0], ratio += at[whole.cols];
    const StateRule rule = state_rule(a, rates, which, whole.rows);
    const double value = move_state(whole.col_var + matrix * whole.cols + i, sum, rule);
    ratio = value > kLeastMean ? ratio / value : 0.0;
    if (sum > 0) least = value;
  }
  double* const room = shared_memory<double>();
  ratio = block_sum(ratio, room), least = block_least(least, room + 32);
  if (threadIdx.x == 0) w.partials[blockIdx.x] = {ratio, least};
}

// A block for each whole: mean R of its matrices, the sum of p^2, and that of squares of g / sqrt(V), NaN where that has
// to be summed by elements.
static __global__ void __launch_bounds__(kFactorThreads)
    block_totals(AdafactorSums a, AdafactorWholes w, const __grid_constant__ AdafactorRates rates) {
  if (a.control->skip) return;
  const AdafactorWhole& whole = w.at[blockIdx.x];
  const int64_t tasks = ceil_div(whole.cols, kFactorThreads);
  double params = 0, updates = 0;
  for (int64_t e = warp(); e < whole.matrices; e += kFactorThreads / kWarp) {
    AdafactorPartial rows{0, INFINITY};
    for (int64_t b = lane(); b < whole.blocks; b += kWarp) {
      const double* const row = whole.statistics + (e * whole.blocks + b) * whole.width + 2 * whole.cols;
      rows.sum += row[0], rows.least = fmin(rows.least, row[1]), params += row[2];
    }
    rows = {warp_sum(rows.sum), warp_least(rows.least)};
    const AdafactorPartial cols = joined(w.partials + whole.first_task + e * tasks, tasks);
    const double mean = fmax(rows.sum / static_cast<double>(whole.rows), rates.mean_floor);
    if (lane() == 0) whole.totals[e] = mean;
    if (lane() == 0) updates += update_sum_of(mean, rows, cols, rates.root_limit);
  }
  for (int64_t b = threadIdx.x; !whole.factored && b < whole.blocks; b += kFactorThreads)
    params += whole.statistics[2 * b], updates += whole.statistics[2 * b + 1];
  double* const room = shared_memory<double>();
  params = block_sum(params, room), updates = block_sum(updates, room + 32);
  if (threadIdx.x != 0) return;
  const bool told = !whole.factored || (whole.cols <= kHeldCols && isfinite(updates));
  whole.totals[whole.matrices] = params;
  whole.totals[whole.matrices + 1] = rates.clip_threshold == INFINITY ? 0.0 : told ? updates : NAN;
}

// A block for each item, a warp for each of its blocks: the sum of squares of g / sqrt(V) where it is by elements.
static __global__ void __launch_bounds__(kFactorThreads) block_updates(AdafactorSums a) {
  if (a.control->skip) return;
  const AdafactorItem& item = a.items[blockIdx.x];
  const bool factored = item.tensor.row_var != nullptr;
  const int64_t count = factored ? item.tensor.slices : ceil_div(item.tensor.cols, kFlatBlock);
  const bool by_elements = factored && isnan(*item.update_sum);
  for (int64_t which = warp(); which < count; which += kFactorThreads / kWarp) {
    double sum = 0;
    if (by_elements) {
      const BlockPlace b = block_of(item, which);
      for (int64_t c = lane(); c < b.chunks; c += kWarp) sum += a.updates[b.chunk + c];
      sum = warp_sum(sum);
    }
    if (lane() == 0) item.own[which] = sum;
  }
}

// --- 3: the step -----------------------------------------------------------------------------------------------------

// A block for each whole: what its RMS(p) and RMS(U) make of the step.
static __global__ void __launch_bounds__(kSumThreads)
    block_scales(AdafactorSums a, AdafactorWholes w, const __grid_constant__ AdafactorRates rates) {
  if (a.control->skip) return;
  const auto which = static_cast<int>(blockIdx.x);
  const AdafactorWhole& whole = w.at[which];
  const double* const totals = whole.totals + whole.matrices;
  double updates = totals[1];
  if (isnan(updates)) {
    const int64_t count = whole.factored ? whole.matrices * whole.blocks : whole.blocks;
    updates = sum_of(whole.sums, 0, count, shared_memory<double>());
  }
  if (threadIdx.x != 0) return;
  a.scales[which] = scale_of(rates, a.control->factor, which, whole.decay, static_cast<double>(whole.size),
                             totals[0], updates);
}

}  // namespace gptcore::cuda
