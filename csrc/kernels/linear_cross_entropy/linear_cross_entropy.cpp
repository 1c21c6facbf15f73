#include "kernels/linear_cross_entropy/linear_cross_entropy.h"

#include <algorithm>
#include <cmath>
#include <cstring>

#include "core/check.h"
#include "core/isa.h"
#include "core/kept_rows.h"
#include "kernels/linear_cross_entropy/linear_cross_entropy_body.h"

namespace gptcore {

GPTCORE_BODIES(LinearCrossEntropyBodies, linear_cross_entropy_f32_bodies)
GPTCORE_BODIES_AMX(LinearCrossEntropyBodies, linear_cross_entropy_bf16_bodies)

namespace {

// Below this many products of numbers (some ten microseconds) one thread is as fast as two.
constexpr int64_t kSerialProducts = 1 << 20;
// Tokens whose logits are kept at a time: so many that passing over weight and dweight again for each chunk is a
// twentieth of its products. torch keeps three matrices of the logits of all.
constexpr int64_t kMostTokens = 512;

const LinearCrossEntropyBodies& bodies_of(const TensorView& x, const TensorView& weight) {
  const bool half = x.dtype == DType::bf16 && weight.dtype == DType::bf16;
  return (half ? linear_cross_entropy_bf16_bodies_table : linear_cross_entropy_f32_bodies_table).pick();
}

void check_inputs(const Checker& check, const TensorView& x, const TensorView& weight,
                  const TensorView& targets, const LinearCrossEntropyOptions& options) {
  check.input(x, "x", {DType::f32, DType::bf16});
  check.ndim(x, "x", 2);
  check.last_contiguous(x, "x");
  check.input(weight, "weight", {DType::f32, DType::bf16});
  check.ndim(weight, "weight", 2);
  check.shape(weight, "weight", {-1, x.size(1)});
  check.last_contiguous(weight, "weight");
  check_loss_options(check, options.reduction, options.label_smoothing);
  if (!std::isfinite(options.z_loss)) check.fail("z_loss", std::to_string(options.z_loss), "a finite number");
  if (!std::isfinite(options.logit_scale)) {
    check.fail("logit_scale", std::to_string(options.logit_scale), "a finite number");
  }
  if (options.logit_soft_cap) {
    const float cap = static_cast<float>(*options.logit_soft_cap);
    if (!(cap > 0 && std::isnormal(cap) && std::isnormal(1 / cap))) {
      check.fail("logit_soft_cap", std::to_string(*options.logit_soft_cap),
                 "None or a number above 0 within f32's range");
    }
  }
  if (options.token_weight) check_row_values(check, options.token_weight, "token_weight", x.size(0));
  check_targets(check, targets, x.size(0), weight.size(0), options.ignore_index);
}

void check_gradients(const Checker& check, const TensorView& x, const TensorView& weight,
                     const TensorView& dx, const TensorView& dweight) {
  if (dx) {
    check.output(dx, "dx", {x.dtype});
    check.same_shape(dx, "dx", x, "x");
    check.last_contiguous(dx, "dx");
  }
  if (dweight) {
    check.output(dweight, "dweight", {DType::f32, weight.dtype});
    check.same_shape(dweight, "dweight", weight, "weight");
    check.last_contiguous(dweight, "dweight");
  }
}

void fill(LinearCrossEntropyInputs* a, const KeptRows& kept, const TensorView& x, const TensorView& weight,
          const LinearCrossEntropyOptions& options) {
  a->x = x.data, a->x_dtype = x.dtype, a->x_stride = x.stride(0);
  a->weight = weight.data, a->weight_dtype = weight.dtype, a->weight_stride = weight.stride(0);
  a->rows = kept.rows(), a->targets = kept.classes();
  a->n = kept.count(), a->c = x.size(1), a->v = weight.size(0);
  a->scale = static_cast<float>(options.logit_scale);
  a->soft_cap = static_cast<float>(options.logit_soft_cap.value_or(0));
  a->modified = a->soft_cap != 0;
  a->scale_left = a->modified ? 1.0f : a->scale;
  a->parallel = a->n * a->c * a->v > kSerialProducts;
}

// How much each kept row counts, and what the sums over rows are divided by.
class Shares {
 public:
  Shares(const KeptRows& kept, const LinearCrossEntropyOptions& options) : kept_(kept) {
    if (options.token_weight) token_weight_ = options.token_weight.as<float>();
    if (options.reduction != "mean") return;
    divisor_ = 0;
    for (int64_t i = 0; i < kept.count(); ++i) divisor_ += of(i);
  }
  double of(int64_t i) const { return token_weight_ ? token_weight_[kept_.row(i)] : 1.0; }
  double divisor() const { return divisor_; }

 private:
  const KeptRows& kept_;
  const float* token_weight_ = nullptr;
  double divisor_ = 1;
};

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
    const double scale = options_.logit_scale * shares_.of(i) / shares_.divisor();
    const double s = options_.label_smoothing;
    g *= scale, gz *= scale * options_.z_loss;
    softmax_[i] = static_cast<float>(g + 2 * gz * lse);
    share_[i] = static_cast<float>(g * (1 - s));
    uniform_[i] = static_cast<float>(g * s / classes_);
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

LinearCrossEntropyBackward backward_of(const LinearCrossEntropyInputs& inputs, const TensorView& dx,
                                       const TensorView& dweight) {
  LinearCrossEntropyBackward a{};
  static_cast<LinearCrossEntropyInputs&>(a) = inputs;
  if (dx) a.dx = dx.data, a.dx_stride = dx.stride(0);
  if (dweight)
    a.dweight = dweight.data, a.dweight_stride = dweight.stride(0), a.dweight_dtype = dweight.dtype;
  return a;
}

// Forward of all kept rows and, chunk by chunk, the gradients for gradients of 1 of loss and z.
void run_with_gradients(const LinearCrossEntropyBodies& bodies, const LinearCrossEntropyForward& whole,
                        const LinearCrossEntropyOptions& options, const KeptRows& kept, const Shares& shares,
                        int64_t chunk, const TensorView& dx, const TensorView& dweight) {
  const int64_t words = (whole.v + kRowPadding - 1) / kRowPadding * kRowPadding;
  const Scratch logits(static_cast<size_t>(words / 16 * kept_stride(chunk)) * sizeof(float));
  Factors factors(kept, 3, options, shares, whole.v);
  for (int64_t first = 0; first < kept.count(); first += chunk) {
    LinearCrossEntropyForward a = whole;
    a.rows += first, a.targets += first, a.lse += first, a.target_logit += first;
    if (a.logit_sum) a.logit_sum += first;
    a.n = std::min(chunk, kept.count() - first);
    a.logits = logits.as<float>();
    bodies.forward(a);
    for (int64_t i = first; i < first + a.n; ++i) factors.set(i, whole.lse[i], 1, 1);
    LinearCrossEntropyBackward b = backward_of(a, dx, dweight);
    b.lse = a.lse, b.resume = first > 0;
    factors.give(&b, first);
    bodies.backward(b);
  }
}

}  // namespace

void linear_cross_entropy_forward(const TensorView& x, const TensorView& weight, const TensorView& targets,
                                  const LinearCrossEntropyOptions& options, const TensorView& loss,
                                  const TensorView& z, const TensorView& logprobs, const TensorView& lse,
                                  const TensorView& dx, const TensorView& dweight) {
  const Checker check("linear_cross_entropy");
  check_inputs(check, x, weight, targets, options);
  const int64_t rows = x.size(0);
  check_loss(check, loss, "loss", rows, options.reduction, {DType::f32});
  check_loss(check, z, "z", rows, options.reduction, {DType::f32});
  check_row_values(check, logprobs, "logprobs", rows);
  check_row_values(check, lse, "lse", rows);
  for (const TensorView* out : {&loss, &z, &logprobs, &lse}) check.writable(*out, "output");
  const bool gradients = dx || dweight;
  if (gradients) {
    check.dtype(weight, "weight", {x.dtype});
    if (is_bf16(x) && rows > kMostTokens) {
      check.fail("x", std::to_string(rows) + " rows", "at most 512 of bf16 for gradients at once");
    }
    if (options.reduction == "none") {
      check.fail("reduction", "'none'", "'mean' or 'sum' for gradients at once");
    }
    check_gradients(check, x, weight, dx, dweight);
  }

  const KeptRows kept(targets, options.ignore_index, 6, kRowPadding);
  const Shares shares(kept, options);
  LinearCrossEntropyForward a{};
  fill(&a, kept, x, weight, options);
  a.lse = kept.values(0), a.target_logit = kept.values(1);
  if (options.label_smoothing > 0) a.logit_sum = kept.values(2);
  if (dx && kept.count() < rows) zero_matrix(dx);
  if (dweight && kept.count() == 0) zero_matrix(dweight);
  if (gradients) {
    const int64_t chunk = std::min((rows + kRowPadding - 1) / kRowPadding * kRowPadding, kMostTokens);
    run_with_gradients(bodies_of(x, weight), a, options, kept, shares, chunk, dx, dweight);
  } else if (kept.count() > 0) {
    bodies_of(x, weight).forward(a);
  }

  const bool per_row = options.reduction == "none";
  for (const TensorView* out : {&logprobs, &lse}) std::memset(out->data, 0, static_cast<size_t>(rows) * 4);
  if (per_row) {
    for (int64_t n = 0; n < rows; ++n) {
      loss.as<float>()[n * loss.stride(0)] = 0.0f;
      z.as<float>()[n * z.stride(0)] = 0.0f;
    }
  }
  const double s = options.label_smoothing, classes = static_cast<double>(weight.size(0));
  double loss_sum = 0, z_sum = 0;  // in row order, rounded once
  for (int64_t i = 0; i < kept.count(); ++i) {
    const int64_t n = kept.row(i);
    const double row_lse = a.lse[i];
    double row_loss = row_lse - (1 - s) * a.target_logit[i];
    if (a.logit_sum) row_loss -= s / classes * a.logit_sum[i];
    row_loss *= shares.of(i);
    const double row_z = shares.of(i) * options.z_loss * row_lse * row_lse;
    lse.as<float>()[n] = a.lse[i];
    logprobs.as<float>()[n] = a.target_logit[i] - a.lse[i];
    loss_sum += row_loss, z_sum += row_z;
    if (!per_row) continue;
    loss.as<float>()[n * loss.stride(0)] = static_cast<float>(row_loss);
    z.as<float>()[n * z.stride(0)] = static_cast<float>(row_z);
  }
  if (per_row) return;
  *loss.as<float>() = static_cast<float>(loss_sum / shares.divisor());
  *z.as<float>() = static_cast<float>(z_sum / shares.divisor());
}

void linear_cross_entropy_backward(const TensorView& grad_loss, const TensorView& grad_z, const TensorView& x,
                                   const TensorView& weight, const TensorView& targets, const TensorView& lse,
                                   const LinearCrossEntropyOptions& options, const TensorView& dx,
                                   const TensorView& dweight, bool accumulate) {
  const Checker check("linear_cross_entropy_backward");
  check_inputs(check, x, weight, targets, options);
  const int64_t rows = x.size(0);
  if (grad_loss) check_loss(check, grad_loss, "grad_loss", rows, options.reduction, {DType::f32});
  if (grad_z) check_loss(check, grad_z, "grad_z", rows, options.reduction, {DType::f32});
  check_row_values(check, lse, "lse", rows);
  check_gradients(check, x, weight, dx, dweight);
  if (dweight && accumulate && dweight.dtype != DType::f32) {
    check.fail("dweight", describe(dweight), "f32 to accumulate into");
  }

  const KeptRows kept(targets, options.ignore_index, 4, kRowPadding);
  if (dx && kept.count() < rows) zero_matrix(dx);
  if (kept.count() == 0) {
    if (dweight && !accumulate) zero_matrix(dweight);
    return;
  }
  LinearCrossEntropyInputs inputs{};
  fill(&inputs, kept, x, weight, options);
  float* row_lse = kept.values(0);
  const Shares shares(kept, options);
  Factors factors(kept, 1, options, shares, weight.size(0));
  const bool per_row = options.reduction == "none";
  for (int64_t i = 0; i < kept.count(); ++i) {
    const int64_t n = kept.row(i);
    row_lse[i] = lse.as<float>()[n];
    factors.set(i, row_lse[i], loss_gradient(grad_loss, per_row, n), loss_gradient(grad_z, per_row, n));
  }
  LinearCrossEntropyBackward a = backward_of(inputs, dx, dweight);
  a.lse = row_lse, a.accumulate = accumulate;
  factors.give(&a, 0);
  bodies_of(x, weight).backward(a);
}

}  // namespace gptcore
