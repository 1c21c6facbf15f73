// The updates of Adafactor on CUDA: their sums of squares by elements, or the parameters written.
#pragma once

#include "kernels/adafactor/adafactor_items.cuh"

namespace gptcore::cuda {

// What moves V on, and what limits 1 / sqrt(V).
struct UpdateNumbers {
  float beta2, rest2, square_factor, added, root_limit, beta1;
};

__device__ __forceinline__ UpdateNumbers update_numbers(const AdafactorSums& a, const AdafactorRates& rates,
                                                        int number) {
  const double k = a.control->factor, beta2 = read_each(rates.beta2, rates.each_beta2, number);
  return {static_cast<float>(beta2), static_cast<float>(1.0 - beta2),
          static_cast<float>(k * k), static_cast<float>(rates.added),
          rates.root_limit,          rates.beta1};
}

// Four elements as they come from memory.
struct UpdateFour {
  GradFour grad;
  Four<float> param, variance, exp_avg;
};

template <bool whole, bool write>
__device__ __forceinline__ UpdateFour load_update(const AdafactorTensor& t, int64_t at, int64_t n) {
  UpdateFour x{};
  x.grad = load_grad<whole>(t.grad, t.bf16_grad, at, n);
  if (t.variance) x.variance = load_four<whole>(t.variance + at, n);
  if (write) x.param = load_four<whole>(t.param + at, n);
  if (write && t.exp_avg) x.exp_avg = load_four<whole>(t.exp_avg + at, n);
  return x;
}

// g / sqrt(V); moves V on where it is not factored. `cols`: 1 / sqrt(C) of the columns.
template <bool whole>
__device__ __forceinline__ Four<float> unscaled(const AdafactorTensor& t, UpdateFour* x, int64_t n,
                                                float row_factor, const float* cols, const UpdateNumbers& a) {
  const Four<float> g = widened(x->grad, t.bf16_grad);
  Four<float> factors{}, u{};
  if (!t.variance) factors = *reinterpret_cast<const Four<float>*>(cols);
#pragma unroll
  for (int k = 0; k < 4; ++k) {
    float root = factors.at[k] * row_factor;
    if (t.variance) {
      const float square = g.at[k] * g.at[k] * a.square_factor + a.added;
      x->variance.at[k] = x->variance.at[k] * a.beta2 + square * a.rest2;
      root = 1.0f / sqrtf(x->variance.at[k]);
    }
    root = root > a.root_limit ? a.root_limit : root;
    u.at[k] = whole || k < n ? g.at[k] * root : 0.0f;
  }
  return u;
}

template <bool whole>
__device__ __forceinline__ void write_four(const AdafactorTensor& t, int64_t at, int64_t n,
                                           const Four<float>& u, const UpdateFour& x, const AdafactorScale& s,
                                           float beta1) {
  Four<float> p = x.param, m = x.exp_avg;
#pragma unroll
  for (int k = 0; k < 4; ++k) {
    float step = u.at[k] * s.scale;
    if (t.exp_avg) step = m.at[k] = m.at[k] * beta1 + step * (1.0f - beta1);
    p.at[k] = p.at[k] * s.keep - step;
  }
  if (t.exp_avg) store_four<whole>(t.exp_avg + at, m, n);
  if (t.variance) store_four<whole>(t.variance + at, x.variance, n);
  store_four<whole>(t.param + at, p, n);
  if (t.copy) store_four<whole>(t.copy + at, rounded<bf16>(p), n);
}

// 1 / sqrt(R / mean R) of the chunk's rows and 1 / sqrt(C) of its columns.
__device__ __forceinline__ void fill_factors(const AdafactorItem& item, const ChunkPlace& p, float* rows,
                                             float* cols) {
  const AdafactorTensor& t = item.tensor;
  const int64_t matrix = item.blocks ? 0 : p.slice;
  const double mean = item.means[matrix];
  const float* state = t.row_var + p.slice * t.rows + p.row;
  for (int r = static_cast<int>(threadIdx.x); r < p.rows; r += kTileThreads)
    rows[r] = static_cast<float>(1.0 / sqrt(static_cast<double>(state[r]) / mean));
  state = t.col_var + matrix * t.cols + p.col;
  for (int c = static_cast<int>(threadIdx.x); c < p.cols; c += kTileThreads)
    cols[c] = static_cast<float>(1.0 / sqrt(static_cast<double>(state[c])));
}

// What a thread walks over: its fours of each of its rows.
struct UpdatePlace {
  int row, four;

  __device__ __forceinline__ UpdatePlace next(const ChunkPlace& p, int fours) const {
    return four + 1 < fours ? UpdatePlace{row, four + 1} : UpdatePlace{row + p.groups, 0};
  }
};

// A block's chunk, and what its elements are multiplied with.
struct UpdateChunk {
  const AdafactorItem& item;
  const ChunkPlace& place;
  const float *rows, *cols;  // factors
  const UpdateNumbers& numbers;
  AdafactorScale scale;

  // One four that has been read; returns its sum of squares.
  template <bool whole, bool write>
  __device__ __forceinline__ double finish(const UpdatePlace& at, int n, UpdateFour* x) const {
    const AdafactorTensor& t = item.tensor;
    const float row = place.factored ? rows[at.row] : 0.0f;
    const Four<float> u = unscaled<whole>(t, x, n, row, cols + place.column + at.four * place.step, numbers);
    if (!write) return square_sum(u.at);
    write_four<whole>(t, place.at(at.row, at.four), n, u, *x, scale, numbers.beta1);
    return 0.0;
  }

  template <bool whole, bool write>
  __device__ __forceinline__ double take(const UpdatePlace& at, int n) const {
    if (n <= 0) return 0.0;
    UpdateFour x = load_update<whole, write>(item.tensor, place.at(at.row, at.four), n);
    return finish<whole, write>(at, n, &x);
  }

  // Two fours at a time where both are whole: both are on their way before the first is written.
  template <bool write>
  __device__ __forceinline__ double walk() const {
    const ChunkPlace& p = place;
    const int fours = item.tiling.fours;
    double sum = 0;
    for (UpdatePlace at{p.group, 0}; at.row < p.rows;) {
      const UpdatePlace other = at.next(p, fours);
      const int n = p.valid(at.row, at.four);
      const int m = other.row < p.rows ? p.valid(other.row, other.four) : 0;
      if (item.aligned && n >= 4 && m >= 4) {
        UpdateFour x = load_update<true, write>(item.tensor, p.at(at.row, at.four), n);
        UpdateFour y = load_update<true, write>(item.tensor, p.at(other.row, other.four), m);
        sum += finish<true, write>(at, n, &x);
        sum += finish<true, write>(other, m, &y);
      } else {
        sum += item.aligned && n >= 4 ? take<true, write>(at, n) : take<false, write>(at, n);
        sum += item.aligned && m >= 4 ? take<true, write>(other, m) : take<false, write>(other, m);
      }
      at = other.next(p, fours);
    }
    return sum;
  }
};

// Shared memory: 32 doubles, then factors of a chunk's rows and columns.
constexpr int64_t kUpdateBytes = 32 * 8 + (kTileRows + kHeldCols) * 4;

// Sums the squares of g / sqrt(V) over each chunk of tensors that want it by elements, or writes the parameters.
template <bool write>
static __global__ void __launch_bounds__(kTileThreads, 3)
    adafactor_updates(AdafactorSums a, const __grid_constant__ AdafactorRates rates) {
  if (a.control->skip) return;
  const AdafactorItem& item = item_of<&AdafactorItem::first_chunk>(a, blockIdx.x);
  if (!write && !isnan(*item.update_sum)) return;
  double* const room = shared_memory<double>();
  auto* const row_factors = reinterpret_cast<float*>(room + 32);
  float* const col_factors = row_factors + kTileRows;
  const ChunkPlace p = place_of(item, blockIdx.x);
  const UpdateNumbers numbers = update_numbers(a, rates, item.number);
  if (p.factored) {
    fill_factors(item, p, row_factors, col_factors);
    __syncthreads();
  }
  const AdafactorScale scale = write ? a.scales[item.number] : AdafactorScale{};
  const UpdateChunk chunk{item, p, row_factors, col_factors, numbers, scale};
  double sum = chunk.walk<write>();
  if (write) return;
  sum = block_sum(sum, room);
  if (threadIdx.x == 0) a.updates[blockIdx.x] = sum;
}

}  // namespace gptcore::cuda
