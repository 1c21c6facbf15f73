// Sums of squares on CUDA of matrices whose rows a block holds in registers: a row's R is complete once it has been read,
// so g^2 / R is added up by columns in the same pass, from which RMS(U) follows (adafactor_states.cuh).
#pragma once

#include "core/cuda/reduce.cuh"
#include "kernels/adafactor/adafactor_items.cuh"

namespace gptcore::cuda {

constexpr float kLeastMean = 1e-37f;  // means below have no inverse in f32: those of nothing but zeros

// A thread's elements of a row.
template <class T>
struct HeldRow {
  Four<T> at[kHeldFours];
};

template <bool whole, class T>
__device__ __forceinline__ void load_row(const T* from, const ChunkPlace& p, int r, HeldRow<T>* row) {
#pragma unroll
  for (int f = 0; f < kHeldFours; ++f) {
    const int n = p.valid(r, f);
    row->at[f] = n > 0 ? load_four<whole>(from + p.at(r, f), n) : Four<T>{};
  }
}

// What a thread has added up: squares by columns, the same over R, and totals of g and p.
struct HeldSums {
  float cols[4 * kHeldFours], ratios[4 * kHeldFours];
  double grads, params;
};

// What moves R on.
struct RowRule {
  float beta2, rest2, factor, added;
};

// The sum over the threads of a row, of which every one gets it; `parts` is a float for each warp.
__device__ __forceinline__ float row_total(float own, const ChunkPlace& p, int threads, float* parts) {
  own = warp_reduce(own);
  if (threads == kWarp) return own;
  if (lane() == 0) parts[warp()] = own;
  named_barrier(1 + p.group, threads);
  const int warps = threads / kWarp;
  float sum = 0;
  for (int w = p.group * warps; w < (p.group + 1) * warps; ++w) sum += parts[w];
  return sum;
}

// The next row is on its way while this one is added up; p, which no sum waits for, comes beside it. `parts` has room for
// two rows, so that one barrier each is enough.
template <class G, bool whole>
__device__ __forceinline__ void take_rows(const AdafactorItem& item, const ChunkPlace& p, const RowRule& rule,
                                          bool params, float* parts, HeldSums* sums) {
  const AdafactorTensor& t = item.tensor;
  const auto* const grads = static_cast<const G*>(t.grad);
  const int64_t first_row = p.slice * t.rows + p.row;
  float* const rows = t.row_sums + first_row;
  const float* const states = t.row_var + first_row;
  HeldRow<G> next{};
  float next_state = 0;
  if (p.group < p.rows) load_row<whole>(grads, p, p.group, &next), next_state = states[p.group];
  for (int r = p.group, turn = 0; r < p.rows; r += p.groups, turn ^= 1) {
    const HeldRow<G> raw = next;
    const float state = next_state;
    const int after = r + p.groups;
    if (after < p.rows) load_row<whole>(grads, p, after, &next), next_state = states[after];
    HeldRow<float> param{};
    if (params) load_row<whole>(t.param, p, r, &param);
    float own = 0;
#pragma unroll
    for (int f = 0; f < kHeldFours; ++f) {
      const Four<float> g = widened(raw.at[f]);
      own += (g.at[0] * g.at[0] + g.at[1] * g.at[1]) + (g.at[2] * g.at[2] + g.at[3] * g.at[3]);
      sums->grads += square_sum(g.at);
    }
    const float row = row_total(own, p, item.tiling.threads, parts + turn * (kTileThreads / kWarp));
    const float moved = state * rule.beta2 + (row * rule.factor + rule.added) * rule.rest2;
    const float weight = 1.0f / fmaxf(moved, kLeastMean);
#pragma unroll
    for (int f = 0; f < kHeldFours; ++f) {
      const Four<float> g = widened(raw.at[f]);
#pragma unroll
      for (int k = 0; k < 4; ++k) {
        const float square = g.at[k] * g.at[k];
        sums->cols[4 * f + k] += square, sums->ratios[4 * f + k] += square * weight;
      }
      if (params) sums->params += square_sum(param.at[f].at);
    }
    if (p.column == 0) rows[r] = row;
  }
}

// Adds up what the block's groups have of columns; `room` is kHeldCols floats.
__device__ __forceinline__ void store_columns(const float (&own)[4 * kHeldFours], const ChunkPlace& p,
                                              int fours, float* room, float* out) {
  const int width = p.step * fours;
  __syncthreads();
#pragma unroll
  for (int f = 0; f < kHeldFours; ++f) {
    if (f >= fours) break;
#pragma unroll
    for (int k = 0; k < 4; ++k) room[p.group * width + f * p.step + p.column + k] = own[4 * f + k];
  }
  __syncthreads();
  for (int c = static_cast<int>(threadIdx.x); c < p.cols; c += kTileThreads) {
    float sum = 0;
    for (int g = 0; g < p.groups; ++g) sum += room[g * width + c];
    out[c] = sum;
  }
}

// Shared memory: 32 doubles, two rows' sums by warps, and kHeldCols columns.
constexpr int64_t kHeldBytes = 32 * 8 + (2 * (kTileThreads / kWarp) + kHeldCols) * 4;

// Of chunks first .. first + gridDim.x - 1 the sums of g^2, of p^2 where `params`, and by rows and columns. Backwards, so
// that what the next pass begins with was read last.
static __global__ void __launch_bounds__(kTileThreads, 2)
    adafactor_rows(AdafactorSums a, int64_t first, const __grid_constant__ AdafactorRates rates,
                   const __grid_constant__ GradientRule gradient, bool params) {
  double* const room = shared_memory<double>();
  auto* const parts = reinterpret_cast<float*>(room + 32);
  float* const columns = parts + 2 * (kTileThreads / kWarp);
  const int64_t chunk = first + (gridDim.x - 1 - blockIdx.x);
  const AdafactorItem& item = item_of<&AdafactorItem::first_chunk>(a, chunk);
  const AdafactorTensor& t = item.tensor;
  const ChunkPlace p = place_of(item, chunk);
  const double k = factor_of(gradient).factor;
  const double beta2 = read_each(rates.beta2, rates.each_beta2, item.number);
  const RowRule rule = {static_cast<float>(beta2), static_cast<float>(1.0 - beta2),
                        static_cast<float>(k * k / static_cast<double>(t.cols)),
                        static_cast<float>(rates.added)};
  HeldSums sums{};
  if (item.aligned) {
    t.bf16_grad ? take_rows<bf16, true>(item, p, rule, params, parts, &sums)
                : take_rows<float, true>(item, p, rule, params, parts, &sums);
  } else {
    t.bf16_grad ? take_rows<bf16, false>(item, p, rule, params, parts, &sums)
                : take_rows<float, false>(item, p, rule, params, parts, &sums);
  }
  const int64_t out = (p.slice * item.tiling.row_blocks + p.row_block) * t.cols;
  store_columns(sums.cols, p, item.tiling.fours, columns, t.col_sums + out);
  store_columns(sums.ratios, p, item.tiling.fours, columns, t.ratio_sums + out);
  const double grads = block_sum(sums.grads, room);
  __syncthreads();
  const double squares = params ? block_sum(sums.params, room) : 0.0;
  if (threadIdx.x == 0) a.grads[chunk] = grads, a.params[chunk] = squares;
}

}  // namespace gptcore::cuda
