#include "kernels/adafactor/adafactor_blocks.h"

#include <memory>

#include "core/arena.h"
#include "core/parallel.h"
#include "kernels/adafactor/adafactor_phase.h"

namespace gptcore {

namespace {

constexpr double kLeastMean = 1e-37;  // as in adafactor_cpu.cpp

double* row_of(const Views& list, size_t slice, int64_t row, int64_t width) {
  return list[slice].as<double>() + row * width;
}

double sum_of(const std::vector<double>& sums, const SliceBlock& block) {
  double total = 0;
  for (size_t c = block.chunk; c < block.chunk + block.chunks; ++c) total += sums[c];
  return total;
}

// --- 1: statistics -----------------------------------------------------------------------------------------

// out[j] = sum over the block's chunks below each other.
void add_chunks(const float* sums, int64_t cols, const SliceBlock& block, double* out) {
  std::fill(out, out + cols, 0.0);
  for (int64_t r = block.row_chunk; r < block.row_chunk + block.row_chunks; ++r) {
    const float* const at = sums + r * cols;
    for (int64_t j = 0; j < cols; ++j) out[j] += at[j];
  }
}

// Moves R of the block's rows on; their sum and the least with a gradient into out.
void move_rows(const AdafactorTensor& t, const SliceBlock& block, const AdafactorNumbers& a, double* out) {
  const double factor = a.square_factor / static_cast<double>(t.cols);
  double total = 0, least = std::numeric_limits<double>::infinity();
  for (int64_t i = block.row; i < block.row + block.rows; ++i) {
    double sum = 0;
    for (int64_t b = 0; b < t.col_blocks; ++b) sum += t.row_sums[b * t.rows + i];
    const double r = t.row_var[i] * a.beta2 + (sum * factor + a.square_added) * a.rest2;
    t.row_var[i] = static_cast<float>(r);
    total += r;
    if (sum > 0) least = std::min(least, r);
  }
  out[0] = total, out[1] = least;
}

void place_sums(SlicePlan* plan, float* at) {
  const auto take = [&](float** field, int64_t size) {
    *field = at;
    at += size;
  };
  for (size_t i = 0; i < plan->factored_parts; ++i) {
    AdafactorTensor& t = plan->tensors[i];
    take(&t.row_sums, t.rows * t.col_blocks);
    take(&t.col_sums, t.cols * t.row_blocks);
    take(&t.ratio_sums, t.cols * t.row_blocks);
    t.summed = true;  // of updates scales() has no business yet
  }
}

int64_t sum_floats(const SlicePlan& plan) {
  int64_t count = 0;
  for (size_t i = 0; i < plan.factored_parts; ++i) {
    const AdafactorTensor& t = plan.tensors[i];
    count += t.rows * t.col_blocks + 2 * t.cols * t.row_blocks;
  }
  return count;
}

}  // namespace

void adafactor_statistics(const AdafactorSlices& call, const AdafactorOptions& options,
                          const Views& statistics) {
  Phase phase(call, options);
  const AdafactorOptions& o = phase.o;
  phase.take(
      statistics, "statistics", [](const SliceOf& s) { return std::pair(s.own_blocks(), s.width()); }, true);
  if (phase.is_done(&AdafactorBlocksBodies::statistics, &statistics, nullptr, nullptr)) return;
  phase.cut_slices();
  SlicePlan& plan = phase.plan;
  const Scratch scratch(static_cast<size_t>(sum_floats(plan)) * sizeof(float));
  place_sums(&plan, scratch.as<float>());
  std::vector<double> update_sums(plan.chunks.size()), param_sums(plan.chunks.size());
  phase.bodies.squares(plan.tensors.data(), plan.chunks.data(), static_cast<int64_t>(plan.factored_chunks),
                       phase.numbers, update_sums.data());
  phase.bodies.scales(plan.tensors.data(), plan.chunks.data(), phase.chunks(), phase.numbers,
                      o.scale_parameter ? param_sums.data() : nullptr,
                      o.clip_threshold ? update_sums.data() : nullptr);
  parallel_ranges(static_cast<int64_t>(plan.blocks.size()), 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const SliceBlock& block = plan.blocks[static_cast<size_t>(i)];
      const AdafactorTensor& t = plan.tensors[static_cast<size_t>(block.part)];
      const SliceOf& s = phase.slice_of(block);
      double* out =
          row_of(statistics, plan.parts[static_cast<size_t>(block.part)].slice, block.number, s.width());
      const double param_sum = sum_of(param_sums, block);
      if (s.factored) {
        add_chunks(t.col_sums, t.cols, block, out);
        add_chunks(t.ratio_sums, t.cols, block, out + t.cols);
        move_rows(t, block, phase.numbers, out + 2 * t.cols);
        out[2 * t.cols + 2] = param_sum;
      } else {
        out[0] = param_sum, out[1] = o.clip_threshold ? sum_of(update_sums, block) : 0.0;
      }
    }
  });
}

namespace {

// --- 2: updates --------------------------------------------------------------------------------------------

// Some columns of one matrix of a whole.
struct Columns {
  size_t slice;
  int64_t matrix, column, columns;
  // Results: the sum of D / C, and the least C with a gradient.
  double ratios = 0, least = std::numeric_limits<double>::infinity();
};

std::vector<Columns> columns_of(const SlicePlan& plan) {
  std::vector<Columns> tasks;
  for (size_t i = 0; i < plan.slices.size(); ++i) {
    const SliceOf& s = plan.slices[i];
    for (int64_t e = 0; e < s.matrices(); ++e) {
      for (int64_t c = 0; c < s.at.cols; c += kFactorColumns) {
        tasks.push_back({i, e, c, std::min(kFactorColumns, s.at.cols - c)});
      }
    }
  }
  return tasks;
}

// Moves C on by the sums of all blocks.
void move_columns(const SliceOf& s, const double* statistics, float* col_var, const AdafactorNumbers& a,
                  Columns* task) {
  const int64_t count = s.matrix_blocks(), width = s.width();
  const double* const first = statistics + task->matrix * count * width + task->column;
  float* const state = col_var + task->matrix * s.at.cols + task->column;
  const double factor = a.square_factor / static_cast<double>(s.at.rows);
  double sums[kFactorColumns] = {}, ratios[kFactorColumns] = {};
  for (int64_t b = 0; b < count; ++b) {
    const double *const sum = first + b * width, *const ratio = sum + s.at.cols;
    for (int64_t j = 0; j < task->columns; ++j) sums[j] += sum[j], ratios[j] += ratio[j];
  }
  for (int64_t j = 0; j < task->columns; ++j) {
    const double c = state[j] * a.beta2 + (sums[j] * factor + a.square_added) * a.rest2;
    state[j] = static_cast<float>(c);
    if (sums[j] > 0) task->least = std::min(task->least, c);
    if (c > kLeastMean) task->ratios += ratios[j] / c;
  }
}

// Of one whole: mean R of its matrices, and the sums of p^2 and of (g / sqrt(V))^2; the latter by the identity that
// adafactor_cpu.cpp names, NaN where it does not hold. Takes the tasks of its columns.
const Columns* factored_totals(const SliceOf& s, const double* statistics, const AdafactorNumbers& a,
                               const Columns* task, double* totals) {
  const int64_t count = s.matrix_blocks(), cols = s.at.cols;
  double param_sum = 0, update_sum = 0;
  bool holds = chunk_cols(cols) >= cols;
  for (int64_t e = 0; e < s.matrices(); ++e) {
    double sum = 0, least_row = std::numeric_limits<double>::infinity(), least_col = least_row, ratios = 0;
    for (int64_t b = e * count; b < (e + 1) * count; ++b) {
      const double* const row = statistics + b * s.width() + 2 * cols;
      sum += row[0], least_row = std::min(least_row, row[1]), param_sum += row[2];
    }
    for (int64_t c = 0; c < cols; c += kFactorColumns, ++task) {
      ratios += task->ratios, least_col = std::min(least_col, task->least);
    }
    const double mean = std::max(sum / static_cast<double>(s.at.rows), a.mean_floor);
    totals[e] = mean;
    update_sum += mean * ratios;
    holds = holds && std::sqrt(least_row * least_col / mean) * a.root_limit >= 1.001;
  }
  totals[s.matrices()] = param_sum;
  totals[s.matrices() + 1] =
      holds && std::isfinite(update_sum) ? update_sum : std::numeric_limits<double>::quiet_NaN();
  return task;
}

void flat_totals(const SliceOf& s, const double* statistics, double* totals) {
  totals[0] = totals[1] = 0;
  for (int64_t b = 0; b < s.all_blocks(); ++b) {
    totals[0] += statistics[2 * b], totals[1] += statistics[2 * b + 1];
  }
}

// 1 / sqrt(R / mean R) and 1 / sqrt(C) of those parts that `chosen` says yes to.
template <class Chosen>
void set_factors(SlicePlan* plan, const Views& totals, float* at, const Chosen& chosen) {
  for (size_t i = 0; i < plan->factored_parts; ++i) {
    AdafactorTensor& t = plan->tensors[i];
    t.row_factors = at, t.col_factors = at + t.rows;
    at += t.rows + t.cols;
  }
  parallel_for(static_cast<int64_t>(plan->factored_parts), [&](int64_t i, int) {
    const AdafactorTensor& t = plan->tensors[static_cast<size_t>(i)];
    const SlicePart& part = plan->parts[static_cast<size_t>(i)];
    if (!chosen(part.slice)) return;
    const double mean = totals[part.slice].as<double>()[part.matrix];
    for (int64_t r = 0; r < t.rows; ++r)
      t.row_factors[r] = static_cast<float>(1 / std::sqrt(t.row_var[r] / mean));
    for (int64_t c = 0; c < t.cols; ++c) {
      t.col_factors[c] = static_cast<float>(1 / std::sqrt(static_cast<double>(t.col_var[c])));
    }
  });
}

size_t factor_bytes(const SlicePlan& plan) {
  int64_t count = 0;
  for (size_t i = 0; i < plan.factored_parts; ++i) count += plan.tensors[i].rows + plan.tensors[i].cols;
  return static_cast<size_t>(count) * sizeof(float);
}

void move_all_columns(const Phase& phase, const AdafactorSlices& call, const Views& statistics,
                      const Views& totals) {
  const SlicePlan& plan = phase.plan;
  std::vector<Columns> tasks = columns_of(plan);
  parallel_for(static_cast<int64_t>(tasks.size()), [&](int64_t i, int) {
    Columns& task = tasks[static_cast<size_t>(i)];
    move_columns(plan.slices[task.slice], statistics[task.slice].as<double>(),
                 call.lists.col_vars[task.slice].as<float>(), phase.numbers, &task);
  });
  const Columns* task = tasks.data();
  for (size_t i = 0; i < plan.slices.size(); ++i) {
    const SliceOf& s = plan.slices[i];
    double* const out = totals[i].as<double>();
    const double* const all = statistics[i].as<double>();
    if (s.factored) {
      task = factored_totals(s, all, phase.numbers, task, out);
    } else {
      flat_totals(s, all, out);
    }
    // Without a clip nobody asks.
    if (!phase.o.clip_threshold) out[s.matrices() + 1] = 0;
  }
}

}  // namespace

void adafactor_updates(const AdafactorSlices& call, const AdafactorOptions& options, const Views& statistics,
                       const Views& totals, const Views& sums) {
  Phase phase(call, options);
  phase.take(
      statistics, "statistics", [](const SliceOf& s) { return std::pair(s.all_blocks(), s.width()); }, false);
  phase.take_totals(totals, true);
  phase.take(sums, "sums", [](const SliceOf& s) { return std::pair(s.own_blocks(), int64_t{1}); }, true);
  if (phase.is_done(&AdafactorBlocksBodies::updates, &statistics, &totals, &sums)) return;
  phase.cut_slices();
  move_all_columns(phase, call, statistics, totals);
  SlicePlan& plan = phase.plan;
  const auto by_elements = [&](size_t slice) {
    return std::isnan(totals[slice].as<double>()[plan.slices[slice].matrices() + 1]);
  };
  const Scratch scratch(factor_bytes(plan));
  set_factors(&plan, totals, scratch.as<float>(), by_elements);
  std::vector<AdafactorChunk> chunks(plan.chunks.begin(),
                                     plan.chunks.begin() + static_cast<int64_t>(plan.factored_chunks));
  for (size_t i = 0; i < plan.factored_parts; ++i) plan.tensors[i].summed = !by_elements(plan.parts[i].slice);
  std::vector<double> chunk_sums(chunks.size());
  phase.bodies.scales(plan.tensors.data(), chunks.data(), static_cast<int64_t>(chunks.size()), phase.numbers,
                      nullptr, chunk_sums.data());
  for (const SliceBlock& block : plan.blocks) {
    const size_t slice = plan.parts[static_cast<size_t>(block.part)].slice;
    *row_of(sums, slice, block.number, 1) = plan.slices[slice].factored ? sum_of(chunk_sums, block) : 0.0;
  }
}

// --- 3: the parameters -------------------------------------------------------------------------------------

void adafactor_apply(const AdafactorSlices& call, const AdafactorOptions& options, const Views& totals,
                     const Views& sums) {
  Phase phase(call, options);
  phase.take_totals(totals, false);
  phase.take(sums, "sums", [](const SliceOf& s) { return std::pair(s.all_blocks(), int64_t{1}); }, false);
  if (phase.is_done(&AdafactorBlocksBodies::apply, nullptr, &totals, &sums)) return;
  phase.cut_slices();
  SlicePlan& plan = phase.plan;
  const Scratch scratch(factor_bytes(plan));
  set_factors(&plan, totals, scratch.as<float>(), [](size_t) { return true; });
  for (size_t i = 0; i < plan.parts.size(); ++i) {
    const size_t slice = plan.parts[i].slice;
    const SliceOf& s = plan.slices[slice];
    const double* const total = totals[slice].as<double>() + s.matrices();
    double update_sum = total[1];
    if (std::isnan(update_sum)) {
      update_sum = 0;
      for (int64_t b = 0; b < s.all_blocks(); ++b) update_sum += *row_of(sums, slice, b, 1);
    }
    set_scale(phase.o, phase.k, phase.decays[slice], static_cast<double>(s.at.numel), total[0], update_sum,
              &plan.tensors[i]);
  }
  phase.bodies.update(plan.tensors.data(), plan.chunks.data(), phase.chunks(), phase.numbers);
}

}  // namespace gptcore
