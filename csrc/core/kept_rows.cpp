#include "core/kept_rows.h"

#include <cstring>
#include <limits>

namespace gptcore {

void check_targets(const Checker& check, const TensorView& targets, int64_t rows, int64_t classes,
                   int64_t ignore_index) {
  const int64_t limit = std::numeric_limits<int32_t>::max() / 2;  // positions and classes are kept as 32 bits
  if (classes <= 0 || classes > limit) {
    check.fail("targets", std::to_string(classes) + " classes", "1 to 2^30");
  }
  check.input(targets, "targets", {DType::i64});
  check.shape(targets, "targets", {rows});
  if (rows > limit) check.fail("targets", describe(targets), "at most 2^30 rows");
  check.contiguous(targets, "targets");
  if (check.device() != Device::cpu) return;  // the kernel makes NaN of a wrong one
  const int64_t* target = targets.as<int64_t>();
  for (int64_t n = 0; n < rows; ++n) {
    const int64_t t = target[n];
    if (t == ignore_index || (t >= 0 && t < classes)) continue;
    check.fail("targets", std::to_string(t) + " at position " + std::to_string(n),
               "a class of 0 to " + std::to_string(classes - 1) + " or ignore_index " +
                   std::to_string(ignore_index));
  }
}

void check_loss_options(const Checker& check, const std::string& reduction, double label_smoothing) {
  if (!(label_smoothing >= 0 && label_smoothing <= 1)) {
    check.fail("label_smoothing", std::to_string(label_smoothing), "0 to 1");
  }
  if (reduction != "mean" && reduction != "sum" && reduction != "none") {
    check.fail("reduction", "'" + reduction + "'", "'mean', 'sum' or 'none'");
  }
}

void check_loss(const Checker& check, const TensorView& tensor, const char* name, int64_t rows,
                const std::string& reduction, std::initializer_list<DType> types) {
  check.input(tensor, name, types);
  if (reduction == "none") {
    check.shape(tensor, name, {rows});
  } else if (tensor.numel() != 1) {
    check.fail(name, describe(tensor), "one element");
  }
}

void check_row_values(const Checker& check, const TensorView& tensor, const char* name, int64_t rows) {
  check.input(tensor, name, {DType::f32});
  check.shape(tensor, name, {rows});
  check.contiguous(tensor, name);
}

void check_class_values(const Checker& check, const TensorView& tensor, const char* name, int64_t classes,
                        std::initializer_list<DType> types) {
  check.input(tensor, name, types);
  check.shape(tensor, name, {classes});
  check.contiguous(tensor, name);
}

float loss_gradient(const TensorView& grad, bool per_row, int64_t row) {
  if (!grad) return 0.0f;
  const int64_t at = per_row ? row * grad.stride(0) : 0;
  if (grad.dtype == DType::f32) return grad.as<float>()[at];
  const uint32_t bits = static_cast<uint32_t>(grad.as<bf16>()[at].bits) << 16;
  float value;
  std::memcpy(&value, &bits, sizeof(value));
  return value;
}

void store_rounded(const TensorView& out, int64_t at, double value) {
  const float rounded = static_cast<float>(value);
  if (out.dtype == DType::f32) {
    out.as<float>()[at] = rounded;
    return;
  }
  uint32_t bits;
  std::memcpy(&bits, &rounded, sizeof(bits));
  const bool nan = rounded != rounded;
  out.as<bf16>()[at].bits =
      static_cast<uint16_t>(nan ? (bits >> 16) | 0x40u : (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}

void zero_matrix(const TensorView& tensor) {
  const int64_t element = size_of(tensor.dtype);
  for (int64_t r = 0; r < tensor.size(0); ++r) {
    std::memset(tensor.as<char>() + r * tensor.stride(0) * element, 0,
                static_cast<size_t>(tensor.size(1) * element));
  }
}

KeptRows::KeptRows(const TensorView& targets, int64_t ignore_index, int value_arrays, int64_t padding,
                   int64_t first, int64_t slice)
    : padded_((targets.size(0) + padding - 1) / padding * padding),
      room_(static_cast<size_t>(padded_ * (2 + value_arrays)) * 4) {
  rows_ = room_.as<int32_t>();
  classes_ = rows_ + padded_;
  const int64_t* target = targets.as<int64_t>();
  for (int64_t n = 0; n < targets.size(0); ++n) {
    if (target[n] == ignore_index) continue;
    rows_[count_] = static_cast<int32_t>(n);
    const int64_t place = target[n] - first;
    const bool elsewhere = slice > 0 && (place < 0 || place >= slice);
    classes_[count_++] = elsewhere ? -1 : static_cast<int32_t>(place);
  }
  for (int64_t i = count_; i < padded_; ++i) rows_[i] = 0, classes_[i] = -1;
}

float* KeptRows::values(int array) const {
  float* values = room_.as<float>() + (2 + array) * padded_;
  std::memset(values, 0, static_cast<size_t>(padded_) * sizeof(float));
  return values;
}

ClassValues::ClassValues(const TensorView& tensor, int64_t classes, double factor)
    : classes_(classes),
      room_(tensor && (tensor.dtype != DType::f32 || factor != 1.0)
                ? static_cast<size_t>(classes) * sizeof(float)
                : 0) {
  if (!tensor) return;
  values_ = room_.as<float>();
  if (tensor.dtype == DType::f32 && factor == 1.0) {
    values_ = tensor.as<float>();
    return;
  }
  for (int64_t v = 0; v < classes; ++v) {
    room_.as<float>()[v] = static_cast<float>(factor * loss_gradient(tensor, true, v));
  }
}

double ClassValues::sum() const {
  if (!values_) return static_cast<double>(classes_);
  double total = 0;
  for (int64_t v = 0; v < classes_; ++v) total += values_[v];
  return total;
}

}  // namespace gptcore
