#include "kernels/linear_cross_entropy/linear_cross_entropy_checks.h"

#include <cmath>

#include "core/kept_rows.h"

namespace gptcore {

namespace {

void check_slice(const Checker& check, const LinearCrossEntropyOptions& options, int64_t classes) {
  if (options.first_class < 0 || options.first_class + classes > options.num_classes) {
    check.fail(
        "first_class",
        std::to_string(options.first_class) + " with " + std::to_string(classes) + " classes from it on",
        "a slice of " + std::to_string(options.num_classes));
  }
  if (options.reduction != "none")
    check.fail("reduction", "'" + options.reduction + "'", "'none' of a slice");
  if (options.class_weight) check.fail("class_weight", describe(options.class_weight), "None of a slice");
}

}  // namespace

void check_linear_cross_entropy(const Checker& check, const TensorView& x, const TensorView& weight,
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
  const auto check_by_class = [&](const TensorView& tensor, const char* name) {
    if (tensor) check_class_values(check, tensor, name, weight.size(0), {DType::f32, DType::bf16});
  };
  check_by_class(options.bias, "bias");
  check_by_class(options.class_weight, "class_weight");
  if (options.token_weight) check_row_values(check, options.token_weight, "token_weight", x.size(0));
  if (options.num_classes != 0) check_slice(check, options, weight.size(0));
  check_targets(check, targets, x.size(0), all_classes(options, weight), options.ignore_index);
}

void check_linear_cross_entropy_gradients(const Checker& check, const TensorView& x, const TensorView& weight,
                                          const LinearCrossEntropyOptions& options,
                                          const LinearCrossEntropyGradients& gradients) {
  if (gradients.dx) {
    check.output(gradients.dx, "dx", {x.dtype});
    check.same_shape(gradients.dx, "dx", x, "x");
    check.last_contiguous(gradients.dx, "dx");
  }
  if (gradients.dweight) {
    check.output(gradients.dweight, "dweight", {DType::f32, weight.dtype});
    check.same_shape(gradients.dweight, "dweight", weight, "weight");
    check.last_contiguous(gradients.dweight, "dweight");
  }
  if (gradients.dbias) {
    if (!options.bias) check.fail("dbias", describe(gradients.dbias), "None, as bias is");
    check_class_values(check, gradients.dbias, "dbias", weight.size(0), {DType::f32, options.bias.dtype});
    check.writable(gradients.dbias, "dbias");
  }
}

void check_linear_cross_entropy_outputs(const Checker& check, const LinearCrossEntropyOutputs& out,
                                        int64_t rows, const std::string& reduction) {
  check_loss(check, out.loss, "loss", rows, reduction, {DType::f32});
  check_loss(check, out.z, "z", rows, reduction, {DType::f32});
  check_row_values(check, out.logprobs, "logprobs", rows);
  check_row_values(check, out.lse, "lse", rows);
  if (out.entropy) check_row_values(check, out.entropy, "entropy", rows);
  if (out.predicted) {
    check.input(out.predicted, "predicted", {DType::i64});
    check.shape(out.predicted, "predicted", {rows});
    check.contiguous(out.predicted, "predicted");
  }
  for (const TensorView* o : {&out.loss, &out.z, &out.logprobs, &out.lse, &out.entropy, &out.predicted}) {
    check.writable(*o, "output");
  }
}

}  // namespace gptcore
