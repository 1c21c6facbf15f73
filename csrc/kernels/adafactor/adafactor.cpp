#include "kernels/adafactor/adafactor.h"

#include <algorithm>
#include <cmath>
#include <limits>

#include "core/arena.h"
#include "core/tensor_lists.h"
#include "kernels/adafactor/adafactor_body.h"
#include "kernels/adafactor/adafactor_given.h"
#include "kernels/adafactor/adafactor_step.h"

namespace gptcore {

namespace {

using Views = std::vector<TensorView>;

// Elements of the tensors that the last two passes take together: 16 MiB of p, which the last level of cache keeps.
// Half and four times as many cost the same.
constexpr int64_t kBatchElements = int64_t{4} << 20;

// The states of params[i]: one variance of its shape, or a row and a column of factors.
void take_states(const Checker& check, const AdafactorLists& l, size_t i, AdafactorTensor* tensor) {
  const TensorView& p = l.params[i];
  if (l.variances[i].defined) {
    check.item(l.variances, "variances", i, p, {DType::f32}, true);
    tensor->variance = l.variances[i].as<float>();
    tensor->cols = p.numel();
    return;
  }
  if (p.ndim < 2) {
    check.fail(("variances[" + std::to_string(i) + "]").c_str(), "None",
               "a tensor: parameters of less than 2 dimensions are not factored");
  }
  std::vector<int64_t> sizes(p.sizes, p.sizes + p.ndim);
  TensorView like = p;
  like.sizes = sizes.data();
  like.strides = nullptr;
  sizes[p.ndim - 1] = 1;
  check.item(l.row_vars, "row_vars", i, like, {DType::f32}, true);
  sizes[p.ndim - 1] = p.size(-1);
  sizes[p.ndim - 2] = 1;
  check.item(l.col_vars, "col_vars", i, like, {DType::f32}, true);
  tensor->row_var = l.row_vars[i].as<float>();
  tensor->col_var = l.col_vars[i].as<float>();
  tensor->rows = p.size(-2);
  tensor->cols = p.size(-1);
  tensor->slices = p.numel() ? p.numel() / (tensor->rows * tensor->cols) : 0;
}

std::vector<AdafactorTensor> checked_tensors(const Checker& check, const AdafactorLists& l,
                                             const std::vector<double>& weight_decay) {
  const size_t count = l.params.size();
  std::vector<AdafactorTensor> tensors(count);
  take_list(check, l.params, "params", l.params, &AdafactorTensor::param, &tensors);
  take_gradients(check, l.grads, l.params, weight_decay, &tensors);
  check.length(l.row_vars.size(), "row_vars", count);
  check.length(l.col_vars.size(), "col_vars", count);
  check.length(l.variances.size(), "variances", count);
  for (size_t i = 0; i < count; ++i) take_states(check, l, i, &tensors[i]);
  if (!l.exp_avgs.empty()) {
    take_list(check, l.exp_avgs, "exp_avgs", l.params, &AdafactorTensor::exp_avg, &tensors);
  }
  if (!l.copies.empty()) take_list(check, l.copies, "copies", l.params, &AdafactorTensor::copy, &tensors);
  return tensors;
}

// What the passes run over: chunks, tasks of the factors, and batches as ranges of chunks.
struct Plan {
  std::vector<AdafactorChunk> chunks;
  std::vector<AdafactorFactors> factors;
  // Where those of each tensor begin, and the end; tensors of each batch likewise.
  std::vector<size_t> first_chunk = {0}, first_factor = {0}, batches = {0};
  int64_t floats = 0;  // scratch
};

void cut(AdafactorTensor* tensor, int64_t index, Plan* plan) {
  AdafactorTensor& t = *tensor;
  const bool factored = t.row_var != nullptr;
  const int64_t width = factored ? chunk_cols(t.cols) : kMatrixElements;
  const int64_t height = factored ? chunk_rows(t.cols) : 1;
  t.row_blocks = blocks(t.rows, height);
  t.col_blocks = blocks(t.cols, width);
  if (t.slices == 0 || t.rows == 0 || t.cols == 0) return;
  for (int64_t slice = 0; slice < t.slices; ++slice) {
    for (int64_t r = 0; r < t.row_blocks; ++r) {
      for (int64_t c = 0; c < t.col_blocks; ++c) {
        plan->chunks.push_back({index, slice, r * height, std::min(height, t.rows - r * height), c * width,
                                std::min(width, t.cols - c * width), r, c});
      }
    }
    if (!factored) continue;
    plan->factors.push_back({index, slice, -1, 0});
    for (int64_t c = 0; c < t.cols; c += kFactorColumns) {
      plan->factors.push_back({index, slice, c, std::min(kFactorColumns, t.cols - c)});
    }
  }
  if (factored) {
    plan->floats += t.slices * (t.rows * (t.col_blocks + 1) + t.cols * (2 * t.row_blocks + 1));
  }
}

Plan plan_of(std::vector<AdafactorTensor>* tensors) {
  Plan plan;
  int64_t elements = 0;
  for (size_t i = 0; i < tensors->size(); ++i) {
    AdafactorTensor& t = (*tensors)[i];
    cut(&t, static_cast<int64_t>(i), &plan);
    plan.first_chunk.push_back(plan.chunks.size());
    plan.first_factor.push_back(plan.factors.size());
    elements += t.slices * t.rows * t.cols;
    if (elements >= kBatchElements || i + 1 == tensors->size()) {
      plan.batches.push_back(i + 1);
      elements = 0;
    }
  }
  return plan;
}

void place_scratch(std::vector<AdafactorTensor>* tensors, float* at) {
  const auto take = [&](float** field, int64_t size) {
    *field = at;
    at += size;
  };
  for (AdafactorTensor& t : *tensors) {
    if (!t.row_var) continue;
    take(&t.row_sums, t.slices * t.rows * t.col_blocks);
    take(&t.col_sums, t.slices * t.cols * t.row_blocks);
    take(&t.ratio_sums, t.slices * t.cols * t.row_blocks);
    take(&t.row_factors, t.slices * t.rows);
    take(&t.col_factors, t.slices * t.cols);
  }
}

double sum_of(const std::vector<double>& sums, size_t begin, size_t end) {
  double total = 0;
  for (size_t i = begin; i < end; ++i) total += sums[i];
  return total;
}

// The sum of squares of g / sqrt(V) from what the factors' tasks left: for each matrix its rows, then its columns. False
// where the limit of 1 / sqrt(V) may hold somewhere, of which those sums know nothing.
bool sum_from_factors(const AdafactorFactors* task, const AdafactorFactors* end, float root_limit,
                      double* sum) {
  *sum = 0;
  while (task < end) {
    const AdafactorFactors& rows = *task++;
    double ratios = 0, least = std::numeric_limits<double>::infinity();
    for (; task < end && task->column >= 0; ++task) {
      ratios += task->sum;
      least = std::min(least, task->least);
    }
    const double smallest = rows.least * least / rows.sum;  // V; a hair more, for the roundings
    if (std::sqrt(smallest) * root_limit < 1.001) return false;
    *sum += rows.sum * ratios;
  }
  return std::isfinite(*sum);
}

// The passes over the tensors of one call.
class Step {
 public:
  Step(std::vector<AdafactorTensor>* tensors, Plan* plan, const std::vector<double>& weight_decay,
       const AdafactorOptions& options)
      : tensors_(*tensors),
        plan_(*plan),
        weight_decay_(weight_decay),
        o_(options),
        bodies_(adafactor_bodies_table.pick()),
        sums_(plan->chunks.size()),
        param_sums_(plan->chunks.size()) {}

  void set_factor(double k) {
    k_ = k;
    numbers_ = numbers_of(o_, k);
  }

  // Reads the gradients; returns their sum of squares.
  double squares() {
    bodies_.squares(tensors_.data(), plan_.chunks.data(), static_cast<int64_t>(plan_.chunks.size()), numbers_,
                    sums_.data());
    return sum_of(sums_, 0, sums_.size());
  }

  // Moves the factored states on. With `ratios`, squares() knew k, so that the sums of updates follow.
  void factors(bool ratios) {
    AdafactorFactors* tasks = plan_.factors.data();
    bodies_.factors(tensors_.data(), tasks, static_cast<int64_t>(plan_.factors.size()), numbers_);
    for (size_t i = 0; i < tensors_.size() && ratios; ++i) {
      AdafactorTensor& t = tensors_[i];
      const size_t chunk = plan_.first_chunk[i], next = plan_.first_chunk[i + 1];
      if (!t.row_var || t.col_blocks != 1 || chunk == next) continue;
      double sum;
      t.summed = sum_from_factors(tasks + plan_.first_factor[i], tasks + plan_.first_factor[i + 1],
                                  numbers_.root_limit, &sum);
      if (!t.summed) continue;
      std::fill(sums_.begin() + static_cast<int64_t>(chunk), sums_.begin() + static_cast<int64_t>(next), 0.0);
      sums_[chunk] = sum;
    }
  }

  // Writes the parameters.
  void update(size_t begin, size_t end) {
    const size_t first = plan_.first_chunk[begin], last = plan_.first_chunk[end];
    const int64_t count = static_cast<int64_t>(last - first);
    const AdafactorChunk* chunks = plan_.chunks.data() + first;
    bool known = true;
    for (size_t i = begin; i < end && o_.clip_threshold; ++i) known = known && tensors_[i].summed;
    if (!known || o_.scale_parameter) {
      bodies_.scales(tensors_.data(), chunks, count, numbers_,
                     o_.scale_parameter ? param_sums_.data() + first : nullptr,
                     known ? nullptr : sums_.data() + first);
    }
    for (size_t i = begin; i < end; ++i) {
      const size_t chunk = plan_.first_chunk[i], next = plan_.first_chunk[i + 1];
      AdafactorTensor& t = tensors_[i];
      const double size = static_cast<double>(t.slices * t.rows * t.cols);
      set_scale(o_, k_, weight_decay_[i], size, sum_of(param_sums_, chunk, next), sum_of(sums_, chunk, next),
                &t);
    }
    bodies_.update(tensors_.data(), chunks, count, numbers_);
  }

 private:
  std::vector<AdafactorTensor>& tensors_;
  Plan& plan_;
  const std::vector<double>& weight_decay_;
  const AdafactorOptions& o_;
  const AdafactorBodies& bodies_;
  AdafactorNumbers numbers_ = {};
  double k_ = 1;
  std::vector<double> sums_, param_sums_;
};

}  // namespace

std::pair<double, bool> adafactor(const AdafactorLists& lists, const std::vector<double>& weight_decay,
                                  const AdafactorOptions& options) {
  return adafactor(lists, weight_decay, options, given_of(options));
}

std::pair<double, bool> adafactor(const AdafactorLists& lists, const std::vector<double>& weight_decay,
                                  const AdafactorOptions& options, const AdafactorGiven& given) {
  const Checker check("adafactor_", adafactor_bodies_table.device);
  std::vector<AdafactorTensor> tensors = checked_tensors(check, lists, weight_decay);
  const auto count = static_cast<int64_t>(tensors.size());
  const bool elsewhere = adafactor_bodies_table.on_device(check);
  check_given(check, given, count, elsewhere);
  AdafactorOptions o = known_options(options, given);
  const bool skips = o.grad_norm && !std::isfinite(*o.grad_norm);  // by a tensor: plain numbers are checked
  const double told = o.grad_norm.value_or(0.0);
  if (skips) o.grad_norm = 0.0;
  check_options(check, o);
  check_steps(check, given.steps, tensors.size());
  check_result(check, given.result);
  if (elsewhere) {
    std::pair<double, bool> here{told, skips};
    const std::vector<float*> counts = counts_of(given.steps);
    AdafactorStep a = on_device(o, given, weight_decay, counts);
    if (!given.result.norm.defined && check.device() == Device::cpu) a.result = {&here.first, &here.second};
    adafactor_bodies_table.pick(check).step(tensors.data(), count, a);
    return here;
  }
  if (skips) return give(given.result, told, true);
  std::vector<double> decays = weight_decay;
  for (double& decay : decays) decay *= given.decay_factor.value;
  Plan plan = plan_of(&tensors);
  const Scratch scratch(static_cast<size_t>(plan.floats) * sizeof(float));
  place_scratch(&tensors, scratch.as<float>());
  Step step(&tensors, &plan, decays, o);
  // Without a clip, and with one whose norm is known, the squares are scaled from the start.
  const bool known = !o.max_norm || o.grad_norm;
  step.set_factor(known ? factor_of(o, o.grad_norm.value_or(0.0)) : 1.0);
  const double total = step.squares();
  const double norm = o.grad_norm.value_or(std::sqrt(total) / o.grad_scale);
  if (!std::isfinite(norm)) return give(given.result, norm, true);
  if (!known) step.set_factor(factor_of(o, norm));
  step.factors(known);
  for (size_t b = 0; b + 1 < plan.batches.size(); ++b) step.update(plan.batches[b], plan.batches[b + 1]);
  for (const TensorView& count_of_one : given.steps) *count_of_one.as<float>() += 1.0f;
  return give(given.result, norm, false);
}

}  // namespace gptcore
