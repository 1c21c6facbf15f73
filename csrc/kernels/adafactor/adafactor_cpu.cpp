#include "core/parallel.h"
#include "core/simd.h"
#include "kernels/adafactor/adafactor_body.h"

namespace gptcore {
namespace GPTCORE_ISA_NS {
namespace {

// Rows taken together, which share what is loaded for their columns; columns over which f32 lanes add up.
constexpr int64_t kRows = 4;
constexpr int64_t kTile = 64 * kLanes;
// Means below have no inverse in f32; rows and columns of nothing but zeros come to it.
constexpr float kLeastMean = 1e-37f;

// Calls body(row, rows, col, cols) over a chunk of `rows` x `cols` in tiles; a constant number of rows unrolls.
template <class F>
GPTCORE_INLINE void for_tiles(int64_t rows, int64_t cols, const F& body) {
  for (int64_t col = 0; col < cols; col += kTile) {
    const int64_t width = cols - col < kTile ? cols - col : kTile;
    int64_t row = 0;
    for (; row + kRows <= rows; row += kRows) body(row, kRows, col, width);
    for (; row < rows; ++row) body(row, int64_t{1}, col, width);
  }
}

// --- squares -----------------------------------------------------------------------------------------------

// The squares of a chunk in f64, where those in f32 left its range. All-zero gradients are common.
template <class T>
double slow_total(const T* grad, int64_t stride, int64_t rows, int64_t cols) {
  double total = 0;
  for (int64_t r = 0; r < rows; ++r) {
    VecI largest = {};
    for_lanes(cols, [&](int64_t j, int64_t n) {
      const VecI magnitude = (VecI)abs(load_some(grad + r * stride + j, n));
      largest = magnitude > largest ? magnitude : largest;
    });
    bool zero = true;
    for (int lane = 0; lane < kLanes; ++lane) zero = zero && largest[lane] == 0;
    if (zero) continue;
    for (int64_t j = 0; j < cols; ++j) {
      const double g = load_n(grad + r * stride + j, 1)[0];
      total += g * g;
    }
  }
  return total;
}

// Rows are fetched this many ahead: the processor's own prefetching stops at each page of 4 KiB.
template <class T>
GPTCORE_INLINE void fetch_ahead(const T* at, int64_t stride) {
  __builtin_prefetch(at + kRows * stride, 0, 2);
}

// Sum of x^2.
template <class T>
double plain_squares(const T* x, int64_t stride, int64_t rows, int64_t cols) {
  double total = 0;
  for_tiles(rows, cols, [&](int64_t row, int64_t count, int64_t col, int64_t width) {
    const T* at = x + row * stride + col;
    Vec sums[kRows] = {};
    for_lanes(width, [&](int64_t j, int64_t n) {
      for (int64_t r = 0; r < count; ++r) {
        fetch_ahead(at + r * stride + j, stride);
        const Vec v = load_some(at + r * stride + j, n);
        sums[r] += v * v;
      }
    });
    total += reduce_add((sums[0] + sums[1]) + (sums[2] + sums[3]));
  });
  return total > 1e-30 && total < 1e38 ? total : slow_total(x, stride, rows, cols);
}

// The moving average one step on; `sum` of as many raw squares as `factor` divides by.
GPTCORE_INLINE Vec moved(Vec state, Vec sum, float factor, const AdafactorNumbers& a) {
  const float added = static_cast<float>(a.square_added);
  return state * static_cast<float>(a.beta2) + (sum * factor + added) * static_cast<float>(a.rest2);
}

// Sums of squares of `count` rows, and 1 / R of each where the chunk spans whole rows.
template <class T>
GPTCORE_INLINE double row_squares(const T* grad, int64_t stride, int64_t count, int64_t cols, float* sums) {
  double total = 0;
  for (int64_t r = 0; r < count; ++r) sums[r] = 0;
  for (int64_t col = 0; col < cols; col += kTile) {
    Vec parts[kRows] = {};
    for_lanes(cols - col < kTile ? cols - col : kTile, [&](int64_t j, int64_t n) {
      for (int64_t r = 0; r < count; ++r) {
        const T* at = grad + r * stride + col + j;
        if (r < count / 2) fetch_ahead(at, stride);
        const Vec g = load_some(at, n);
        parts[r] += g * g;
      }
    });
    for (int64_t r = 0; r < count; ++r) sums[r] += reduce_add(parts[r]);
  }
  for (int64_t r = 0; r < count; ++r) total += sums[r];
  return total;
}

// A chunk's place in the scratch of its tensor.
struct ChunkSums {
  float *rows, *cols, *ratios;
  const float* row_state;
  float row_factor;  // of the rows' sums in `moved`
};

// Sum of g^2, by rows and columns as well, and by columns of g^2 / R: a row's R is complete once it has been read,
// and while it is in the first level of cache it is read again. So the sum of squares of g / sqrt(V), which wants all
// of R and C, costs no pass of its own. Each reading fetches half of the next rows, so that memory rests in neither.
template <class T>
double factored_squares(const T* grad, int64_t stride, int64_t rows, int64_t cols, const ChunkSums& out,
                        const AdafactorNumbers& a) {
  double total = 0;
  for_lanes(cols, [&](int64_t j, int64_t n) {
    store_some(out.cols + j, Vec{}, n);
    store_some(out.ratios + j, Vec{}, n);
  });
  const auto take = [&](int64_t row, int64_t count) {
    const T* at = grad + row * stride;
    total += row_squares(at, stride, count, cols, out.rows + row);
    float weights[kRows];
    for (int64_t r = 0; r < count; ++r) {
      const Vec moved_row = moved(splat(out.row_state[row + r]), splat(out.rows[row + r]), out.row_factor, a);
      weights[r] = 1.0f / at_least(moved_row, kLeastMean)[0];
    }
    for_lanes(cols, [&](int64_t j, int64_t n) {
      Vec sum = load_some(out.cols + j, n), ratio = load_some(out.ratios + j, n);
      for (int64_t r = 0; r < count; ++r) {
        if (r >= count / 2) fetch_ahead(at + r * stride + j, stride);
        const Vec g = load_some(at + r * stride + j, n), square = g * g;
        sum += square;
        ratio += square * weights[r];
      }
      store_some(out.cols + j, sum, n);
      store_some(out.ratios + j, ratio, n);
    });
  };
  int64_t row = 0;
  for (; row + kRows <= rows; row += kRows) take(row, kRows);
  for (; row < rows; ++row) take(row, 1);
  return total > 1e-30 && total < 1e38 ? total : slow_total(grad, stride, rows, cols);
}

GPTCORE_INLINE int64_t offset_of(const AdafactorTensor& tensor, const AdafactorChunk& chunk) {
  return (chunk.slice * tensor.rows + chunk.row) * tensor.cols + chunk.col;
}

template <class T>
double chunk_squares(const AdafactorTensor& t, const AdafactorChunk& c, const AdafactorNumbers& a) {
  const T* grad = static_cast<const T*>(t.grad) + offset_of(t, c);
  if (!t.row_var) return plain_squares(grad, t.cols, c.rows, c.cols);
  const int64_t by_columns = (c.slice * t.row_blocks + c.row_block) * t.cols + c.col;
  const ChunkSums out = {t.row_sums + (c.slice * t.col_blocks + c.col_block) * t.rows + c.row,
                         t.col_sums + by_columns, t.ratio_sums + by_columns,
                         t.row_var + c.slice * t.rows + c.row,
                         static_cast<float>(a.square_factor / static_cast<double>(t.cols))};
  return factored_squares(grad, t.cols, c.rows, c.cols, out, a);
}

void squares(const AdafactorTensor* tensors, const AdafactorChunk* chunks, int64_t count,
             const AdafactorNumbers& numbers, double* totals) {
  // Backwards, so that what comes first in the next pass was read last.
  parallel_for(count, [&](int64_t task, int) {
    const int64_t i = count - 1 - task;
    const AdafactorTensor& t = tensors[chunks[i].tensor];
    totals[i] = t.bf16_grad ? chunk_squares<bf16>(t, chunks[i], numbers)
                            : chunk_squares<float>(t, chunks[i], numbers);
  });
}

// --- factors -----------------------------------------------------------------------------------------------

// One row's or column's state moved on and returned in f64: what follows from it enters every element.
GPTCORE_INLINE double move(float* state, double sum, double factor, const AdafactorNumbers& a) {
  const double value = *state * a.beta2 + (sum * factor + a.square_added) * a.rest2;
  *state = static_cast<float>(value);
  return value;
}

// Where no gradient is, no update can be held back.
GPTCORE_INLINE void keep_least(AdafactorFactors* task, double value, double sum) {
  if (sum > 0 && value < task->least) task->least = value;
}

void row_factors(const AdafactorTensor& t, AdafactorFactors* task, const AdafactorNumbers& a) {
  const float* sums = t.row_sums + task->slice * t.col_blocks * t.rows;
  float* state = t.row_var + task->slice * t.rows;
  float* factors = t.row_factors + task->slice * t.rows;
  const double factor = a.square_factor / static_cast<double>(t.cols);
  double total = 0;
  for (int64_t i = 0; i < t.rows; ++i) {
    double sum = 0;
    for (int64_t b = 0; b < t.col_blocks; ++b) sum += sums[b * t.rows + i];
    const double r = move(state + i, sum, factor, a);
    total += r;
    keep_least(task, r, sum);
  }
  const double mean = total / static_cast<double>(t.rows);
  task->sum = mean < a.mean_floor ? a.mean_floor : mean;
  for (int64_t i = 0; i < t.rows; ++i) {
    factors[i] = static_cast<float>(1 / __builtin_sqrt(state[i] / task->sum));
  }
}

// The sums of a column's chunks below each other.
GPTCORE_INLINE double sum_of_blocks(const float* sums, int64_t count, int64_t stride) {
  double sum = 0;
  for (int64_t b = 0; b < count; ++b) sum += sums[b * stride];
  return sum;
}

void col_factors(const AdafactorTensor& t, AdafactorFactors* task, const AdafactorNumbers& a) {
  const int64_t below = task->slice * t.row_blocks * t.cols + task->column;
  float* state = t.col_var + task->slice * t.cols + task->column;
  float* factors = t.col_factors + task->slice * t.cols + task->column;
  const double factor = a.square_factor / static_cast<double>(t.rows);
  for (int64_t j = 0; j < task->columns; ++j) {
    const double sum = sum_of_blocks(t.col_sums + below + j, t.row_blocks, t.cols);
    const double c = move(state + j, sum, factor, a);
    factors[j] = static_cast<float>(1 / __builtin_sqrt(c));
    keep_least(task, c, sum);
    if (c > kLeastMean) task->sum += sum_of_blocks(t.ratio_sums + below + j, t.row_blocks, t.cols) / c;
  }
}

void factors(const AdafactorTensor* tensors, AdafactorFactors* tasks, int64_t count,
             const AdafactorNumbers& numbers) {
  parallel_for(count, [&](int64_t i, int) {
    AdafactorFactors& task = tasks[i];
    if (task.column < 0) {
      row_factors(tensors[task.tensor], &task, numbers);
    } else {
      col_factors(tensors[task.tensor], &task, numbers);
    }
  });
}

// --- update ------------------------------------------------------------------------------------------------

// g / sqrt(V), before the factor k that `scale` holds, and V where it is not factored.
struct Step {
  Vec unscaled, variance;
};

// One vector of a chunk: row r of the tile (factored), column j. The body is the same for the pass that sums and the
// one that writes, so both see the same values.
template <class T, bool factored>
GPTCORE_INLINE Step step_of(const T* grad, Vec col_factor, float row_factor, const float* variance, int64_t n,
                            const AdafactorNumbers& a) {
  const Vec g = load_some(grad, n);
  if constexpr (factored) return {g * at_most(col_factor * row_factor, a.root_limit), Vec{}};
  const Vec v = moved(load_some(variance, n), g * g, static_cast<float>(a.square_factor), a);
  return {g * at_most(1.0f / sqrt(v), a.root_limit), v};
}

// Calls body(offset, n, step) for all vectors of a chunk; offset from the start of the tensor.
template <class T, bool factored, class F, class Done>
GPTCORE_INLINE void for_steps(const AdafactorTensor& t, const AdafactorChunk& c, const AdafactorNumbers& a,
                              const F& body, const Done& tile_done) {
  const T* grad = static_cast<const T*>(t.grad);
  const int64_t start = offset_of(t, c);
  const float* row_factor = factored ? t.row_factors + c.slice * t.rows + c.row : nullptr;
  const float* col_factor = factored ? t.col_factors + c.slice * t.cols + c.col : nullptr;
  for_tiles(c.rows, c.cols, [&](int64_t row, int64_t count, int64_t col, int64_t width) {
    for_lanes(width, [&](int64_t j, int64_t n) {
      const Vec factor = factored ? load_some(col_factor + col + j, n) : Vec{};
      for (int64_t r = 0; r < count; ++r) {
        const int64_t at = start + (row + r) * t.cols + col + j;
        fetch_ahead(grad + at, t.cols);
        body(at, n, r,
             step_of<T, factored>(grad + at, factor, factored ? row_factor[row + r] : 0.0f,
                                  factored ? nullptr : t.variance + at, n, a));
      }
    });
    tile_done(count);
  });
}

template <class T, bool factored>
double update_squares(const AdafactorTensor& t, const AdafactorChunk& c, const AdafactorNumbers& a) {
  double total = 0;
  Vec sums[kRows] = {};
  for_steps<T, factored>(
      t, c, a,
      [&](int64_t, int64_t n, int64_t r, const Step& s) {
        // Lanes past the end hold 0 / sqrt(0).
        const Vec u = n == kLanes ? s.unscaled : keep_n(s.unscaled, n, 0.0f);
        sums[r] += u * u;
      },
      [&](int64_t) {
        total += reduce_add((sums[0] + sums[1]) + (sums[2] + sums[3]));
        for (Vec& sum : sums) sum = Vec{};
      });
  return total;
}

double param_squares(const AdafactorTensor& t, const AdafactorChunk& c) {
  return plain_squares(t.param + offset_of(t, c), t.cols, c.rows, c.cols);
}

template <class T, bool factored>
void update_chunk(const AdafactorTensor& t, const AdafactorChunk& c, const AdafactorNumbers& a) {
  for_steps<T, factored>(
      t, c, a,
      [&](int64_t at, int64_t n, int64_t, const Step& s) {
        Vec u = s.unscaled * t.scale;
        if (t.exp_avg) {
          u = load_some(t.exp_avg + at, n) * a.beta1 + u * a.rest1;
          store_some(t.exp_avg + at, u, n);
        }
        if constexpr (!factored) store_some(t.variance + at, s.variance, n);
        fetch_ahead(t.param + at, t.cols);
        const Vec p = load_some(t.param + at, n) * t.keep - u;
        store_some(t.param + at, p, n);
        if (t.copy) store_some(t.copy + at, p, n);
      },
      [](int64_t) {});
}

void scales(const AdafactorTensor* tensors, const AdafactorChunk* chunks, int64_t count,
            const AdafactorNumbers& numbers, double* param_sums, double* update_sums) {
  parallel_for(count, [&](int64_t i, int) {
    const AdafactorChunk& c = chunks[i];
    const AdafactorTensor& t = tensors[c.tensor];
    if (param_sums) param_sums[i] = param_squares(t, c);
    if (!update_sums || t.summed) return;
    if (t.row_var) {
      update_sums[i] = t.bf16_grad ? update_squares<bf16, true>(t, c, numbers)
                                   : update_squares<float, true>(t, c, numbers);
    } else {
      update_sums[i] = t.bf16_grad ? update_squares<bf16, false>(t, c, numbers)
                                   : update_squares<float, false>(t, c, numbers);
    }
  });
}

void update(const AdafactorTensor* tensors, const AdafactorChunk* chunks, int64_t count,
            const AdafactorNumbers& numbers) {
  // Backwards again, over what scales() left in the caches.
  parallel_for(count, [&](int64_t task, int) {
    const AdafactorChunk& c = chunks[count - 1 - task];
    const AdafactorTensor& t = tensors[c.tensor];
    if (t.row_var) {
      t.bf16_grad ? update_chunk<bf16, true>(t, c, numbers) : update_chunk<float, true>(t, c, numbers);
    } else {
      t.bf16_grad ? update_chunk<bf16, false>(t, c, numbers) : update_chunk<float, false>(t, c, numbers);
    }
  });
}

}  // namespace

extern const AdafactorBodies adafactor_bodies;
const AdafactorBodies adafactor_bodies = {squares, factors, scales, update, nullptr};

}  // namespace GPTCORE_ISA_NS
}  // namespace gptcore
