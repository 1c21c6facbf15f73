// Numbers of a step that may lie on a device: their checks, what the processor knows of them, and how bodies get them.
#pragma once

#include <limits>
#include <vector>

#include "kernels/adafactor/adafactor.h"
#include "kernels/adafactor/adafactor_body.h"

namespace gptcore {
namespace {

// One number for all tensors, or on a device one for each.
inline void check_each(const Checker& check, const StepNumber& n, const char* name, int64_t count,
                       bool elsewhere) {
  if (elsewhere && n.tensor.defined && n.tensor.dtype == DType::f64 && n.tensor.numel() == count) {
    if (!is_known(n)) check.on_device(n.tensor, name);
    check.contiguous(n.tensor, name);
  } else {
    check_step_number(check, n, name);
  }
}

inline void check_given(const Checker& check, const AdafactorGiven& given, int64_t count, bool elsewhere) {
  check_each(check, given.step_size, "step_size", count, elsewhere);
  check_each(check, given.beta2, "beta2", count, elsewhere);
  check_step_number(check, given.decay_factor, "decay_factor");
  check_step_number(check, given.grad_scale, "grad_scale");
  if (given.grad_norm) check_norm(check, *given.grad_norm);
}

inline AdafactorGiven given_of(const AdafactorOptions& options) {
  AdafactorGiven given;
  given.step_size = options.step_size, given.beta2 = options.beta2, given.grad_scale = options.grad_scale;
  if (options.grad_norm) given.grad_norm = *options.grad_norm;
  return given;
}

// The options with what is known of `given`; what is not passes their checks.
inline AdafactorOptions known_options(const AdafactorOptions& options, const AdafactorGiven& given) {
  const auto value = [](const StepNumber& n, double otherwise) { return is_known(n) ? n.value : otherwise; };
  AdafactorOptions o = options;
  o.step_size = value(given.step_size, 0.0), o.beta2 = value(given.beta2, 0.0);
  o.grad_scale = value(given.grad_scale, 1.0);
  o.grad_norm = std::nullopt;
  if (given.grad_norm) o.grad_norm = value(*given.grad_norm, 0.0);
  return o;
}

inline AdafactorStep on_device(const AdafactorOptions& o, const AdafactorGiven& given,
                               const std::vector<double>& weight_decay, const std::vector<float*>& steps) {
  constexpr double none = std::numeric_limits<double>::infinity();
  AdafactorStep a{};
  a.step_size = on_device(given.step_size), a.beta2 = on_device(given.beta2);
  a.each_step_size = given.step_size.tensor.defined && given.step_size.tensor.numel() != 1;
  a.each_beta2 = given.beta2.tensor.defined && given.beta2.tensor.numel() != 1;
  a.decay_factor = on_device(given.decay_factor), a.scale = on_device(given.grad_scale);
  a.known = given.grad_norm.has_value();
  if (a.known) a.norm = on_device(*given.grad_norm);
  a.max_norm = o.max_norm.value_or(none), a.clip_threshold = o.clip_threshold.value_or(none);
  a.eps1 = o.eps1, a.eps2 = o.eps2, a.beta1 = static_cast<float>(o.beta1);
  a.eps_added = o.eps_added, a.scale_parameter = o.scale_parameter, a.scaled_decay = o.scaled_decay;
  a.maximize = o.maximize;
  a.weight_decay = weight_decay.data(), a.steps = steps.empty() ? nullptr : steps.data();
  a.result = a.known ? on_device(given.result, *given.grad_norm) : on_device(given.result);
  return a;
}

}  // namespace
}  // namespace gptcore
