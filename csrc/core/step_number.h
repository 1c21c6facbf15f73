// Numbers of an update that may live on the device: a learning rate or a loss scale that a graph of the device's work
// finds there each time it runs, and the norm that goes back. On the processor they are read at once.
#pragma once

#include <cmath>
#include <utility>

#include "core/check.h"
#include "core/device_number.h"

namespace gptcore {

// As the caller gives it: a number, or a tensor of one element, whose value the processor knows if it can reach it.
struct StepNumber {
  double value;
  TensorView tensor;  // undefined for a plain number

  StepNumber(double value = 0, const TensorView& tensor = {}) : value(value), tensor(tensor) {}
};

// Where an update's norm (f64) and whether a gradient was not finite (bool) are written, one element each; undefined
// where they are returned alone.
struct StepResult {
  TensorView norm, found_inf;
};

// Whether its value can be looked at: not that of a tensor on a device.
inline bool is_known(const StepNumber& n) { return !n.tensor.defined || n.tensor.device == Device::cpu; }

inline void check_one_element(const Checker& check, const TensorView& tensor, const char* name) {
  if (tensor.numel() != 1) check.fail(name, describe(tensor), "one element");
}

// Of a tensor: one element on the call's device, or on the processor.
inline void check_step_number(const Checker& check, const StepNumber& n, const char* name) {
  if (!n.tensor.defined) return;
  if (!is_known(n)) check.on_device(n.tensor, name);
  check.dtype(n.tensor, name, {DType::f32, DType::f64, DType::i64});
  check_one_element(check, n.tensor, name);
}

// Where its value is known it must satisfy `fits`.
template <class Fits>
void check_value(const Checker& check, const StepNumber& n, const char* name, const Fits& fits,
                 const char* expected) {
  if (is_known(n)) check.number(fits(n.value), name, n.value, expected);
}
inline void check_not_negative(const Checker& check, const StepNumber& n, const char* name) {
  check_value(
      check, n, name, [](double x) { return x >= 0 && std::isfinite(x); }, "a finite number, 0 or more");
}
inline void check_positive(const Checker& check, const StepNumber& n, const char* name) {
  check_value(check, n, name, [](double x) { return x > 0 && std::isfinite(x); }, "a finite number above 0");
}

// A plain norm must be finite: who gives one has looked. One in a tensor may not be, and then nothing is written.
inline void check_norm(const Checker& check, const StepNumber& norm) {
  check_step_number(check, norm, "grad_norm");
  if (!norm.tensor.defined) check_not_negative(check, norm, "grad_norm");
}

// Both or neither, where the gradients are; tensors of another device need them.
inline void check_result(const Checker& check, const StepResult& result) {
  if (!result.norm.defined && !result.found_inf.defined) {
    if (check.device() != Device::cpu) check.fail("out", "None", "two tensors, for gradients on a device");
    return;
  }
  check.output(result.norm, "out[0]", {DType::f64});
  check_one_element(check, result.norm, "out[0]");
  check.output(result.found_inf, "out[1]", {DType::boolean});
  check_one_element(check, result.found_inf, "out[1]");
}

inline DeviceNumber on_device(const StepNumber& n) {
  return {n.value, n.tensor.data, n.tensor.defined ? n.tensor.dtype : DType::f64};
}

inline DeviceResult on_device(const StepResult& r) { return {r.norm.as<double>(), r.found_inf.as<bool>()}; }
// The same beside a norm that may lie there already.
inline DeviceResult on_device(const StepResult& r, const StepNumber& norm) {
  DeviceResult result = on_device(r);
  if (norm.tensor.data == result.norm) result.norm = nullptr;
  return result;
}

// What a call returns of its norm, beside what it has written into `result`.
inline std::pair<double, bool> give(const StepResult& result, double norm, bool found_inf) {
  if (result.norm.defined) *result.norm.as<double>() = norm, *result.found_inf.as<bool>() = found_inf;
  return {norm, found_inf};
}

}  // namespace gptcore
