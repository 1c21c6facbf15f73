#include "kernels/linear_cross_entropy/linear_cross_entropy_rows.h"

#include "core/check.h"
#include "core/isa.h"
#include "core/kept_rows.h"
#include "kernels/linear_cross_entropy/linear_cross_entropy_checks.h"
#include "kernels/linear_cross_entropy/linear_cross_entropy_rows_body.h"

namespace gptcore {

GPTCORE_DEVICE_BODIES(LinearCrossEntropyRowsBodies, linear_cross_entropy_rows_bodies)

namespace {

const LinearCrossEntropyRowsBodies& device_bodies(const Checker& check, const TensorView& tensor,
                                                  const char* name) {
  const LinearCrossEntropyRowsBodies* bodies = linear_cross_entropy_rows_bodies_table.pick_device(check);
  if (!bodies) check.fail(name, describe(tensor) + " on the CPU", "a tensor on a device with kernels");
  return *bodies;
}

void check_row_sums(const Checker& check, const TensorView& sums, const char* name, int64_t rows) {
  check.input(sums, name, {DType::f64});
  check.shape(sums, name, {rows});
  check.contiguous(sums, name);
}

void check_divisors(const Checker& check, const TensorView& divisors) {
  check_row_sums(check, divisors, "divisors", 3);
}

// Outputs and gradients of a chunk that are there; n tokens of v classes.
void check_rows(const Checker& check, const LinearCrossEntropyRows& r, int64_t n, int64_t v,
                const std::string& reduction) {
  for (const auto& [sums, name] : {std::pair{&r.row_loss, "row_loss"}, std::pair{&r.row_z, "row_z"}}) {
    if (*sums) check_row_sums(check, *sums, name, n);
  }
  for (const auto& [values, name] :
       {std::pair{&r.logprobs, "logprobs"}, std::pair{&r.lse, "lse"}, std::pair{&r.entropy, "entropy"}}) {
    if (*values) check_row_values(check, *values, name, n);
  }
  if (r.lse_given) check.defined(r.lse, "lse");
  if (r.predicted) {
    check.input(r.predicted, "predicted", {DType::i64});
    check.shape(r.predicted, "predicted", {n});
    check.contiguous(r.predicted, "predicted");
  }
  if (r.grad_loss) check_loss(check, r.grad_loss, "grad_loss", n, reduction, {DType::f32});
  if (r.grad_z) check_loss(check, r.grad_z, "grad_z", n, reduction, {DType::f32});
  if (r.grad_loss && r.grad_z && reduction == "none" && r.grad_loss.stride(0) != r.grad_z.stride(0)) {
    check.fail("grad_z", "another stride than grad_loss has", "the same");
  }
  if (!r.dlogits) return;
  check.output(r.dlogits, "dlogits", {DType::f32, DType::bf16});
  check.shape(r.dlogits, "dlogits", {n, v});
  check.last_contiguous(r.dlogits, "dlogits");
}

}  // namespace

void linear_cross_entropy_check(const TensorView& x, const TensorView& weight, const TensorView& targets,
                                const LinearCrossEntropyOptions& options,
                                const LinearCrossEntropyOutputs& outputs,
                                const LinearCrossEntropyGradients& gradients) {
  const Checker check("linear_cross_entropy", linear_cross_entropy_rows_bodies_table.device);
  check_linear_cross_entropy(check, x, weight, targets, options);
  if (outputs.loss) check_linear_cross_entropy_outputs(check, outputs, x.size(0), options.reduction);
  check_linear_cross_entropy_gradients(check, x, weight, options, gradients);
}

void linear_cross_entropy_divisors(const TensorView& targets, int64_t classes,
                                   const LinearCrossEntropyOptions& options, const TensorView& divisors) {
  const Checker check("linear_cross_entropy_divisors", linear_cross_entropy_rows_bodies_table.device);
  check_targets(check, targets, targets.numel(), classes, options.ignore_index);
  check_divisors(check, divisors);
  LossDivisors a{};
  a.targets = targets.as<int64_t>(), a.ignore_index = options.ignore_index;
  a.rows = targets.numel(), a.classes = classes;
  a.class_weight = class_vector(options.class_weight);
  a.token_weight = options.token_weight.as<float>();
  a.mean = options.reduction == "mean";
  a.divisors = divisors.as<double>();
  device_bodies(check, targets, "targets").divisors(a);
}

void linear_cross_entropy_rows(const TensorView& products, const TensorView& targets,
                               const LinearCrossEntropyOptions& options, const LinearCrossEntropyRows& r) {
  const Checker check("linear_cross_entropy_rows", linear_cross_entropy_rows_bodies_table.device);
  check.input(products, "products", {DType::f32});
  check.ndim(products, "products", 2);
  check.last_contiguous(products, "products");
  const int64_t n = products.size(0), v = products.size(1);
  const bool slice = options.num_classes > 0;
  check_targets(check, targets, n, slice ? options.num_classes : v, options.ignore_index);
  check_divisors(check, r.divisors);
  check_rows(check, r, n, v, options.reduction);

  LossRows a{};
  a.logits = products.data, a.stride = products.stride(0), a.rows = n, a.classes = v;
  a.targets = targets.as<int64_t>(), a.ignore_index = options.ignore_index;
  a.first_class = slice ? options.first_class : 0, a.all_classes = slice ? options.num_classes : v,
  a.slice = slice;
  a.scale = static_cast<float>(options.logit_scale);
  a.soft_cap = static_cast<float>(options.logit_soft_cap.value_or(0));
  a.bias = class_vector(options.bias), a.class_weight = class_vector(options.class_weight);
  a.token_weight = options.token_weight.as<float>();
  a.smoothing = options.label_smoothing, a.z_loss = options.z_loss;
  a.divisors = r.divisors.as<double>(), a.lse_given = r.lse_given;
  a.lse = r.lse.as<float>(), a.logprobs = r.logprobs.as<float>(), a.entropy = r.entropy.as<float>();
  a.predicted = r.predicted.as<int64_t>();
  a.row_loss = r.row_loss.as<double>(), a.row_z = r.row_z.as<double>();
  a.dlogits = r.dlogits.data, a.out_stride = r.dlogits ? r.dlogits.stride(0) : 0;
  a.grad_loss = class_vector(r.grad_loss), a.grad_z = r.grad_z.as<float>();
  a.grad_per_row = options.reduction == "none";
  const TensorView& by_row = r.grad_loss ? r.grad_loss : r.grad_z;
  a.grad_stride = a.grad_per_row && by_row ? by_row.stride(0) : 0;
  a.missing = static_cast<float>(r.missing);
  if (n > 0) device_bodies(check, products, "products").rows[r.dlogits && is_bf16(r.dlogits)](a);
}

void linear_cross_entropy_totals(const TensorView& row_loss, const TensorView& row_z,
                                 const TensorView& divisors, const TensorView& loss, const TensorView& z) {
  const Checker check("linear_cross_entropy_totals", linear_cross_entropy_rows_bodies_table.device);
  const int64_t rows = row_loss ? row_loss.numel() : 0;
  check_row_sums(check, row_loss, "row_loss", rows);
  check_row_sums(check, row_z, "row_z", rows);
  check_divisors(check, divisors);
  const std::string reduction = loss && loss.ndim == 1 ? "none" : "sum";
  check_loss(check, loss, "loss", rows, reduction, {DType::f32});
  check_loss(check, z, "z", rows, reduction, {DType::f32});
  LossTotals a{};
  a.row_loss = row_loss.as<double>(), a.row_z = row_z.as<double>(), a.divisors = divisors.as<double>();
  a.rows = rows, a.per_row = reduction == "none";
  a.loss = loss.data, a.z = z.data;
  a.loss_stride = a.per_row ? loss.stride(0) : 0, a.z_stride = a.per_row ? z.stride(0) : 0;
  device_bodies(check, row_loss, "row_loss").totals(a);
}

}  // namespace gptcore
