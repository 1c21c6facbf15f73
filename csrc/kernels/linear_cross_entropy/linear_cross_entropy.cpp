#include "kernels/linear_cross_entropy/linear_cross_entropy.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>

#include "core/check.h"
#include "core/isa.h"
#include "core/kept_rows.h"
#include "kernels/linear_cross_entropy/linear_cross_entropy_body.h"
#include "kernels/linear_cross_entropy/linear_cross_entropy_checks.h"

namespace gptcore {

GPTCORE_BODIES(LinearCrossEntropyBodies, linear_cross_entropy_f32_bodies)
GPTCORE_BODIES_AMX(LinearCrossEntropyBodies, linear_cross_entropy_bf16_bodies)

namespace {

// Below this many products of numbers (some ten microseconds) one thread is as fast as two.
constexpr int64_t kSerialProducts = 1 << 20;

const LinearCrossEntropyBodies& bodies_of(const TensorView& x, const TensorView& weight) {
  const bool half = x.dtype == DType::bf16 && weight.dtype == DType::bf16;
  return (half ? linear_cross_entropy_bf16_bodies_table : linear_cross_entropy_f32_bodies_table).pick();
}

KeptRows kept_rows(const TensorView& targets, const TensorView& weight,
                   const LinearCrossEntropyOptions& options, int value_arrays) {
  const int64_t slice = options.num_classes > 0 ? weight.size(0) : 0;
  return KeptRows(targets, options.ignore_index, value_arrays, kRowPadding, options.first_class, slice);
}

// Those that forward makes at once.
void check_gradients_at_once(const Checker& check, const TensorView& x, const TensorView& weight,
                             const LinearCrossEntropyOptions& options,
                             const LinearCrossEntropyGradients& gradients) {
  check.dtype(weight, "weight", {x.dtype});
  if (is_bf16(x) && x.size(0) > kMostTokens) {
    check.fail("x", std::to_string(x.size(0)) + " rows", "at most 512 of bf16 for gradients at once");
  }
  if (options.reduction == "none") {
    check.fail("reduction", "'none'", "'mean' or 'sum' for gradients at once");
  }
  check_linear_cross_entropy_gradients(check, x, weight, options, gradients);
}

// How much rows and classes count in the loss, and what sums over rows are divided by.
class Shares {
 public:
  Shares(const KeptRows& kept, const LinearCrossEntropyOptions& options, int64_t classes)
      : kept_(kept),
        class_weight_(options.class_weight, classes, 1.0),
        smoothing_(options.label_smoothing),
        even_(smoothing_ / static_cast<double>(classes)) {
    if (options.token_weight) token_weight_ = options.token_weight.as<float>();
    if (class_weight_.values() && smoothing_ > 0) all_ = even_ * class_weight_.sum();
    if (options.reduction != "mean") return;
    loss_divisor_ = z_divisor_ = 0;
    for (int64_t i = 0; i < kept.count(); ++i) {
      z_divisor_ += of(i);
      loss_divisor_ += of(i) * class_weight_.at(kept.classes()[i]);
    }
  }
  double of(int64_t i) const { return token_weight_ ? token_weight_[kept_.row(i)] : 1.0; }
  // Of a row's target, of each class per unit of its weight, and what the two add up to over the classes.
  double target(int64_t i) const { return (1 - smoothing_) * class_weight_.at(kept_.classes()[i]); }
  double even() const { return even_; }
  double all(int64_t i) const { return class_weight_.values() ? target(i) + all_ : 1.0; }

  double loss_divisor() const { return loss_divisor_; }
  double z_divisor() const { return z_divisor_; }
  const float* class_weight() const { return smoothing_ > 0 ? class_weight_.values() : nullptr; }

 private:
  const KeptRows& kept_;
  const ClassValues class_weight_;
  const float* token_weight_ = nullptr;
  const double smoothing_, even_;
  double all_ = 0, loss_divisor_ = 1, z_divisor_ = 1;
};

void fill(LinearCrossEntropyInputs* a, const KeptRows& kept, const TensorView& x, const TensorView& weight,
          const LinearCrossEntropyOptions& options, const ClassValues& bias, const Shares& shares) {
  a->x = x.data, a->x_dtype = x.dtype, a->x_stride = x.stride(0);
  a->weight = weight.data, a->weight_dtype = weight.dtype, a->weight_stride = weight.stride(0);
  a->rows = kept.rows(), a->targets = kept.classes();
  a->n = kept.count(), a->c = x.size(1), a->v = weight.size(0);
  a->scale = static_cast<float>(options.logit_scale);
  a->soft_cap = static_cast<float>(options.logit_soft_cap.value_or(0));
  a->bias = bias.values(), a->class_weight = shares.class_weight();
  a->modified = a->soft_cap != 0 || a->bias;
  a->scale_left = a->modified ? 1.0f : a->scale;
  a->parallel = a->n * a->c * a->v > kSerialProducts;
}

// What backward wants of each kept row, in three of its value arrays.
class Factors {
 public:
  Factors(const KeptRows& kept, int first_array, const LinearCrossEntropyOptions& options,
          const Shares& shares, int64_t classes)
      : options_(options),
        shares_(shares),
        softmax_(kept.values(first_array)),
        share_(kept.values(first_array + 1)),
        uniform_(kept.values(first_array + 2)),
        classes_(static_cast<double>(classes)) {}

  // Under the gradients g of loss and gz of z.
  void set(int64_t i, double lse, double g, double gz) {
    const double scale = options_.logit_scale * shares_.of(i);
    g *= scale / shares_.loss_divisor(), gz *= scale / shares_.z_divisor() * options_.z_loss;
    softmax_[i] = static_cast<float>(g * shares_.all(i) + 2 * gz * lse);
    share_[i] = static_cast<float>(g * shares_.target(i));
    uniform_[i] = static_cast<float>(g * options_.label_smoothing / classes_);
  }
  void give(LinearCrossEntropyBackward* a, int64_t first) const {
    a->softmax_factor = softmax_ + first, a->target_share = share_ + first;
    a->uniform = options_.label_smoothing > 0 ? uniform_ + first : nullptr;
  }

 private:
  const LinearCrossEntropyOptions& options_;
  const Shares& shares_;
  float *softmax_, *share_, *uniform_;
  double classes_;
};

// Sums for dbias in f32, rounded to it at the end.
class BiasSums {
 public:
  explicit BiasSums(const TensorView& dbias)
      : dbias_(dbias), room_(dbias ? static_cast<size_t>(dbias.numel()) * sizeof(float) : 0) {
    if (dbias) std::memset(room_.as<float>(), 0, static_cast<size_t>(dbias.numel()) * sizeof(float));
  }
  float* sums() const { return dbias_ ? room_.as<float>() : nullptr; }
  void finish() const {
    for (int64_t v = 0; dbias_ && v < dbias_.numel(); ++v) store_rounded(dbias_, v, sums()[v]);
  }

 private:
  const TensorView& dbias_;
  Scratch room_;
};

LinearCrossEntropyBackward backward_of(const LinearCrossEntropyInputs& inputs,
                                       const LinearCrossEntropyGradients& gradients, const BiasSums& bias) {
  LinearCrossEntropyBackward a{};
  static_cast<LinearCrossEntropyInputs&>(a) = inputs;
  const TensorView &dx = gradients.dx, &dweight = gradients.dweight;
  if (dx) a.dx = dx.data, a.dx_stride = dx.stride(0);
  if (dweight)
    a.dweight = dweight.data, a.dweight_stride = dweight.stride(0), a.dweight_dtype = dweight.dtype;
  a.dbias = bias.sums();
  return a;
}

// Forward of all kept rows and, chunk by chunk, the gradients for gradients of 1 of loss and z.
void run_with_gradients(const LinearCrossEntropyBodies& bodies, const LinearCrossEntropyForward& whole,
                        const LinearCrossEntropyOptions& options, const KeptRows& kept, const Shares& shares,
                        int64_t chunk, const LinearCrossEntropyGradients& gradients) {
  const int64_t words = (whole.v + kRowPadding - 1) / kRowPadding * kRowPadding;
  const Scratch logits(static_cast<size_t>(words / 16 * kept_stride(chunk)) * sizeof(float));
  const BiasSums bias(gradients.dbias);
  Factors factors(kept, 3, options, shares, whole.v);
  for (int64_t first = 0; first < kept.count(); first += chunk) {
    LinearCrossEntropyForward a = whole;
    a.rows += first, a.targets += first, a.lse += first, a.target_logit += first;
    if (a.logit_sum) a.logit_sum += first;
    if (a.entropy) a.entropy += first, a.predicted += first;
    a.n = std::min(chunk, kept.count() - first);
    a.logits = logits.as<float>();
    bodies.forward(a);
    for (int64_t i = first; i < first + a.n; ++i) factors.set(i, whole.lse[i], 1, 1);
    LinearCrossEntropyBackward b = backward_of(a, gradients, bias);
    b.lse = a.lse, b.resume = first > 0;
    factors.give(&b, first);
    bodies.backward(b);
  }
  bias.finish();
}

// What is 0 where rows are ignored, and all of the weight's gradients where no row is left.
void zero_ignored(const KeptRows& kept, int64_t rows, const LinearCrossEntropyGradients& gradients,
                  bool accumulate) {
  if (gradients.dx && kept.count() < rows) zero_matrix(gradients.dx);
  if (gradients.dweight && kept.count() == 0 && !accumulate) zero_matrix(gradients.dweight);
  if (gradients.dbias && kept.count() == 0) BiasSums(gradients.dbias).finish();
}

// Outputs from what the bodies found of the kept rows.
void store_results(const LinearCrossEntropyForward& a, const LinearCrossEntropyOptions& options,
                   const KeptRows& kept, const Shares& shares, int64_t rows,
                   const LinearCrossEntropyOutputs& out) {
  const bool per_row = options.reduction == "none", slice = options.num_classes > 0;
  for (const TensorView* o : {&out.logprobs, &out.lse}) {
    if (rows > 0) std::memset(o->data, 0, static_cast<size_t>(rows) * sizeof(float));
  }
  if (out.entropy) std::fill_n(out.entropy.as<float>(), rows, 0.0f);
  if (out.predicted) std::fill_n(out.predicted.as<int64_t>(), rows, -1);
  for (int64_t n = 0; per_row && n < rows; ++n) {
    out.loss.as<float>()[n * out.loss.stride(0)] = 0.0f;
    out.z.as<float>()[n * out.z.stride(0)] = 0.0f;
  }
  double loss_sum = 0, z_sum = 0;  // in row order, rounded once
  for (int64_t i = 0; i < kept.count(); ++i) {
    const int64_t n = kept.row(i);
    const double row_lse = a.lse[i];
    double row_loss = (slice ? 0 : shares.all(i) * row_lse) - shares.target(i) * a.target_logit[i];
    if (a.logit_sum) row_loss -= shares.even() * a.logit_sum[i];
    row_loss *= shares.of(i);
    const double row_z = shares.of(i) * options.z_loss * row_lse * row_lse;
    out.lse.as<float>()[n] = a.lse[i];
    out.logprobs.as<float>()[n] = a.target_logit[i] - (slice ? 0 : a.lse[i]);
    if (out.entropy) out.entropy.as<float>()[n] = a.entropy[i];
    if (out.predicted) out.predicted.as<int64_t>()[n] = a.predicted[i];
    loss_sum += row_loss, z_sum += row_z;
    if (!per_row) continue;
    out.loss.as<float>()[n * out.loss.stride(0)] = static_cast<float>(row_loss);
    out.z.as<float>()[n * out.z.stride(0)] = static_cast<float>(row_z);
  }
  if (per_row) return;
  *out.loss.as<float>() = static_cast<float>(loss_sum / shares.loss_divisor());
  *out.z.as<float>() = static_cast<float>(z_sum / shares.z_divisor());
}

}  // namespace

void linear_cross_entropy_forward(const TensorView& x, const TensorView& weight, const TensorView& targets,
                                  const LinearCrossEntropyOptions& options,
                                  const LinearCrossEntropyOutputs& out,
                                  const LinearCrossEntropyGradients& gradients) {
  const Checker check("linear_cross_entropy");
  check_linear_cross_entropy(check, x, weight, targets, options);
  const int64_t rows = x.size(0);
  check_linear_cross_entropy_outputs(check, out, rows, options.reduction);
  const bool at_once = gradients.dx || gradients.dweight || gradients.dbias;
  if (at_once) check_gradients_at_once(check, x, weight, options, gradients);

  const bool observed = out.entropy || out.predicted;
  const KeptRows kept = kept_rows(targets, weight, options, observed ? 8 : 6);
  const Shares shares(kept, options, all_classes(options, weight));
  const ClassValues bias(options.bias, weight.size(0), options.logit_scale);
  LinearCrossEntropyForward a{};
  fill(&a, kept, x, weight, options, bias, shares);
  a.lse = kept.values(0), a.target_logit = kept.values(1);
  if (options.label_smoothing > 0) a.logit_sum = kept.values(2);
  if (observed) {
    a.entropy = kept.values(6), a.predicted = reinterpret_cast<int32_t*>(kept.values(7));
  }
  zero_ignored(kept, rows, gradients, false);
  if (at_once) {
    const int64_t chunk = std::min((rows + kRowPadding - 1) / kRowPadding * kRowPadding, kMostTokens);
    run_with_gradients(bodies_of(x, weight), a, options, kept, shares, chunk, gradients);
  } else if (kept.count() > 0) {
    bodies_of(x, weight).forward(a);
  }
  store_results(a, options, kept, shares, rows, out);
}

void linear_cross_entropy_backward(const TensorView& grad_loss, const TensorView& grad_z, const TensorView& x,
                                   const TensorView& weight, const TensorView& targets, const TensorView& lse,
                                   const LinearCrossEntropyOptions& options,
                                   const LinearCrossEntropyGradients& gradients, bool accumulate) {
  const Checker check("linear_cross_entropy_backward");
  check_linear_cross_entropy(check, x, weight, targets, options);
  const int64_t rows = x.size(0);
  if (grad_loss) check_loss(check, grad_loss, "grad_loss", rows, options.reduction, {DType::f32});
  if (grad_z) check_loss(check, grad_z, "grad_z", rows, options.reduction, {DType::f32});
  check_row_values(check, lse, "lse", rows);
  check_linear_cross_entropy_gradients(check, x, weight, options, gradients);
  if (gradients.dweight && accumulate && gradients.dweight.dtype != DType::f32) {
    check.fail("dweight", describe(gradients.dweight), "f32 to accumulate into");
  }

  const KeptRows kept = kept_rows(targets, weight, options, 4);
  zero_ignored(kept, rows, gradients, accumulate);
  if (kept.count() == 0) return;
  const Shares shares(kept, options, all_classes(options, weight));
  const ClassValues bias(options.bias, weight.size(0), options.logit_scale);
  LinearCrossEntropyInputs inputs{};
  fill(&inputs, kept, x, weight, options, bias, shares);
  float* row_lse = kept.values(0);
  Factors factors(kept, 1, options, shares, all_classes(options, weight));
  const bool per_row = options.reduction == "none";
  for (int64_t i = 0; i < kept.count(); ++i) {
    const int64_t n = kept.row(i);
    row_lse[i] = lse.as<float>()[n];
    factors.set(i, row_lse[i], loss_gradient(grad_loss, per_row, n), loss_gradient(grad_z, per_row, n));
  }
  // What pads the rows has no products: with a large bias, exp(bias - 0) would be infinite, and its product
  // with a factor of 0 no number.
  std::fill(row_lse + kept.count(), row_lse + kept.padded(), std::numeric_limits<float>::infinity());
  const BiasSums bias_sums(gradients.dbias);
  LinearCrossEntropyBackward a = backward_of(inputs, gradients, bias_sums);
  a.lse = row_lse, a.accumulate = accumulate;
  factors.give(&a, 0);
  bodies_of(x, weight).backward(a);
  bias_sums.finish();
}

}  // namespace gptcore
