#include "kernels/cross_entropy/cross_entropy.h"

#include <cstring>

#include "core/check.h"
#include "core/isa.h"
#include "core/kept_rows.h"
#include "core/loss_rows.h"
#include "kernels/cross_entropy/cross_entropy_body.h"

namespace gptcore {

GPTCORE_BODIES(CrossEntropyBodies, cross_entropy_bodies)
GPTCORE_DEVICE_BODIES(CrossEntropyDeviceBodies, cross_entropy_device_bodies)

namespace {

void check_inputs(const Checker& check, const TensorView& logits, const TensorView& targets,
                  const TensorView& class_weight, int64_t ignore_index, double label_smoothing,
                  const std::string& reduction) {
  check.input(logits, "logits", {DType::f32, DType::bf16});
  check.ndim(logits, "logits", 2);
  check.last_contiguous(logits, "logits");
  check_loss_options(check, reduction, label_smoothing);
  if (class_weight) {
    check_class_values(check, class_weight, "weight", logits.size(1), {DType::f32, logits.dtype});
  }
  check_targets(check, targets, logits.size(0), logits.size(1), ignore_index);
}

double divisor_of(const KeptRows& kept, const ClassValues& weights, const std::string& reduction) {
  if (reduction != "mean") return 1.0;
  double total = 0;
  for (int64_t i = 0; i < kept.count(); ++i) total += weights.at(kept.classes()[i]);
  return total;
}

CrossEntropyDevice device_call_of(const TensorView& logits, const TensorView& targets,
                                  const TensorView& class_weight, int64_t ignore_index,
                                  double label_smoothing, const std::string& reduction) {
  CrossEntropyDevice a{};
  LossRows& rows = a.rows;
  rows.logits = logits.data, rows.stride = logits.stride(0);
  rows.rows = logits.size(0), rows.classes = rows.all_classes = logits.size(1);
  rows.targets = targets.as<int64_t>(), rows.ignore_index = ignore_index;
  rows.scale = 1, rows.smoothing = label_smoothing, rows.missing = 0;
  rows.class_weight = class_vector(class_weight);
  a.mean = reduction == "mean", a.per_row = reduction == "none";
  return a;
}

}  // namespace

void cross_entropy_forward(const TensorView& logits, const TensorView& targets,
                           const TensorView& class_weight, int64_t ignore_index, double label_smoothing,
                           const std::string& reduction, const TensorView& loss, const TensorView& lse) {
  const Checker check("cross_entropy", cross_entropy_device_bodies_table.device);
  check_inputs(check, logits, targets, class_weight, ignore_index, label_smoothing, reduction);
  const int64_t rows = logits.size(0), classes = logits.size(1);
  check_loss(check, loss, "loss", rows, reduction, {DType::f32, logits.dtype});
  check.writable(loss, "loss");
  if (lse) {
    check_row_values(check, lse, "lse", rows);
    check.writable(lse, "lse");
  }

  const CrossEntropyDeviceBodies* device = cross_entropy_device_bodies_table.pick_device(check);
  if (device) {
    CrossEntropyDevice a =
        device_call_of(logits, targets, class_weight, ignore_index, label_smoothing, reduction);
    a.rows.lse = lse.as<float>();
    a.loss = loss.data, a.bf16_loss = is_bf16(loss), a.loss_stride = a.per_row ? loss.stride(0) : 0;
    device->forward[is_bf16(logits)](a);
    return;
  }
  const KeptRows kept(targets, ignore_index, 3, 1);
  const ClassValues weights(class_weight, classes, 1.0);
  CrossEntropyForward a{};
  a.logits = logits.data, a.stride = logits.stride(0), a.rows = kept.count(), a.classes = classes;
  a.index = kept.rows(), a.targets = kept.classes(), a.class_weight = weights.values();
  a.lse = kept.values(0), a.target_logit = kept.values(1);
  if (label_smoothing > 0) a.logit_sum = kept.values(2);
  if (kept.count() > 0) cross_entropy_bodies_table.pick(check).forward[logits.dtype == DType::bf16](a);

  const bool per_row = reduction == "none";
  if (lse && rows > 0) std::memset(lse.data, 0, static_cast<size_t>(rows) * sizeof(float));
  for (int64_t n = 0; per_row && n < rows; ++n) store_rounded(loss, n * loss.stride(0), 0.0);
  const double s = label_smoothing, share = s / static_cast<double>(classes);
  const double all = s > 0 ? weights.sum() : 0.0;
  double total = 0;  // in row order, rounded once
  for (int64_t i = 0; i < kept.count(); ++i) {
    const double row_lse = a.lse[i], w = weights.at(a.targets[i]);
    double row = s < 1 ? (1 - s) * w * (row_lse - a.target_logit[i]) : 0.0;
    if (s > 0) row += share * (all * row_lse - a.logit_sum[i]);
    if (lse) lse.as<float>()[kept.row(i)] = a.lse[i];
    total += row;
    if (per_row) store_rounded(loss, kept.row(i) * loss.stride(0), row);
  }
  if (!per_row) store_rounded(loss, 0, total / divisor_of(kept, weights, reduction));
}

void cross_entropy_backward(const TensorView& grad_loss, const TensorView& logits, const TensorView& targets,
                            const TensorView& class_weight, const TensorView& lse, int64_t ignore_index,
                            double label_smoothing, const std::string& reduction, const TensorView& dlogits) {
  const Checker check("cross_entropy_backward", cross_entropy_device_bodies_table.device);
  check_inputs(check, logits, targets, class_weight, ignore_index, label_smoothing, reduction);
  const int64_t rows = logits.size(0), classes = logits.size(1);
  if (grad_loss) check_loss(check, grad_loss, "grad_loss", rows, reduction, {DType::f32, logits.dtype});
  check_row_values(check, lse, "lse", rows);
  check.output(dlogits, "dlogits", {logits.dtype});
  check.same_shape(dlogits, "dlogits", logits, "logits");
  check.last_contiguous(dlogits, "dlogits");

  const CrossEntropyDeviceBodies* device = cross_entropy_device_bodies_table.pick_device(check);
  if (device) {
    CrossEntropyDevice a =
        device_call_of(logits, targets, class_weight, ignore_index, label_smoothing, reduction);
    a.rows.lse = lse.as<float>(), a.rows.lse_given = true;
    a.rows.dlogits = dlogits.data, a.rows.out_stride = dlogits.stride(0);
    a.rows.grad_loss = class_vector(grad_loss), a.rows.grad_per_row = a.per_row;
    a.rows.grad_stride = a.per_row && grad_loss ? grad_loss.stride(0) : 0;
    device->backward[is_bf16(logits)](a);
    return;
  }
  const KeptRows kept(targets, ignore_index, 4, 1);
  const ClassValues weights(class_weight, classes, 1.0);
  float *row_lse = kept.values(0), *factor = kept.values(1), *share = kept.values(2),
        *uniform = kept.values(3);
  const double s = label_smoothing, even = s / static_cast<double>(classes);
  const double all = s > 0 ? weights.sum() : 0.0, divisor = divisor_of(kept, weights, reduction);
  for (int64_t i = 0; i < kept.count(); ++i) {
    const int64_t n = kept.row(i);
    const double g = loss_gradient(grad_loss, reduction == "none", n) / divisor;
    const double target = g * (1 - s) * weights.at(kept.classes()[i]);
    row_lse[i] = lse.as<float>()[n];
    factor[i] = static_cast<float>(target + g * even * all);
    share[i] = static_cast<float>(target);
    uniform[i] = static_cast<float>(g * even);
  }
  CrossEntropyBackward a{};
  a.logits = logits.data, a.stride = logits.stride(0), a.dlogits = dlogits.data,
  a.out_stride = dlogits.stride(0);
  a.rows = kept.count(), a.classes = classes, a.index = kept.rows(), a.targets = kept.classes();
  a.class_weight = weights.values(), a.lse = row_lse, a.softmax_factor = factor, a.target_share = share;
  a.uniform = s > 0 ? uniform : nullptr;
  if (kept.count() > 0) cross_entropy_bodies_table.pick(check).backward[logits.dtype == DType::bf16](a);
  const int64_t element = size_of(dlogits.dtype);
  for (int64_t n = 0, i = 0; n < rows; ++n) {
    if (i < kept.count() && kept.row(i) == n) {
      ++i;
    } else {
      std::memset(dlogits.as<char>() + n * dlogits.stride(0) * element, 0,
                  static_cast<size_t>(classes * element));
    }
  }
}

}  // namespace gptcore
