// Sums of squares on CUDA, in tiles of columns: of what is not factored, of wide matrices, and where gradients' factor is
// not known yet.
#pragma once

#include "kernels/adafactor/adafactor_items.cuh"

namespace gptcore::cuda {

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

// Of chunks first .. first + gridDim.x - 1 the sums of g^2, and of p^2 where `params`; of factored ones by rows and columns.
// Backwards, so that what the next pass begins with was read last.
static __global__ void __launch_bounds__(kTileThreads, 4)
    adafactor_squares(AdafactorSums a, int64_t first, bool params) {
  double* const room = shared_memory<double>();
  auto* const row_parts = reinterpret_cast<float*>(room + 32);
  float* const col_parts = row_parts + kRowParts;
  const int64_t chunk = first + (gridDim.x - 1 - blockIdx.x);
  const AdafactorItem& item = item_of<&AdafactorItem::first_chunk>(a, chunk);
  const AdafactorTensor& t = item.tensor;
  const ChunkPlace p = place_of(item, chunk);
  const int warps = item.tiling.threads / kWarp, own = p.column / (4 * kWarp);
  SquareSums sums{};
#pragma unroll 2
  for (int r = p.group; r < p.rows; r += p.groups) {
    const int n = p.valid(r);
    const int64_t at = p.at(r);
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
  if (threadIdx.x == 0) a.grads[chunk] = grads, a.params[chunk] = squares;
}

}  // namespace gptcore::cuda
