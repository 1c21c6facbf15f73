// The settings of Adam in any of its forms: their checks, and how they become numbers on either side.
#pragma once

#include <limits>
#include <string>

#include "core/adam_step.h"
#include "core/optimizer.h"

namespace gptcore {

// `steps`: what it counts in where no step is given.
template <class Options>
void check_adam_options(const Checker& check, const Options& o, size_t steps) {
  if (!o.step && steps == 0) check.fail("step", "None", "a number, or steps to count in");
  if (o.step) {
    check_step_number(check, *o.step, "step");
    if (is_known(*o.step) && o.step->value < 1) {
      check.fail("step", std::to_string(static_cast<int64_t>(o.step->value)), "1 or more");
    }
  }
  check_step_number(check, o.lr, "lr");
  check_not_negative(check, o.lr, "lr");
  check.number(o.beta1 >= 0 && o.beta1 < 1, "beta1", o.beta1, "a number in [0, 1)");
  check.number(o.beta2 >= 0 && o.beta2 < 1, "beta2", o.beta2, "a number in [0, 1)");
  check.number(o.eps >= 0 && std::isfinite(o.eps), "eps", o.eps, "a finite number, 0 or more");
  check_step_number(check, o.grad_scale, "grad_scale");
  check_positive(check, o.grad_scale, "grad_scale");
  check_clip(check, o.max_norm);
}

// This update's number, where the processor may read it: counts must agree, one call having one number.
template <class Options>
double step_of(const Checker& check, const Options& o, const std::vector<TensorView>& steps) {
  if (o.step) return o.step->value;
  for (size_t i = 1; i < steps.size(); ++i) {
    if (*steps[i].as<float>() == *steps[0].as<float>()) continue;
    check.fail(("steps[" + std::to_string(i) + "]").c_str(), std::to_string(*steps[i].as<float>()),
               "the count of the others, " + std::to_string(*steps[0].as<float>()) + ", without a step");
  }
  return static_cast<double>(*steps[0].as<float>()) + 1.0;
}

inline void write_steps(const std::vector<TensorView>& steps, double step) {
  for (const TensorView& view : steps) *view.as<float>() = static_cast<float>(step);
}

// What another device is told, which reads there what is a tensor.
template <class Options>
AdamStep on_device(const Options& o, const StepNumber& norm, const std::vector<float*>& counts,
                   const StepResult& result) {
  AdamStep a{};
  if (o.step) a.step = on_device(*o.step);
  a.lr = on_device(o.lr), a.scale = on_device(o.grad_scale), a.norm = on_device(norm);
  a.steps = counts.empty() ? nullptr : counts.data(), a.counted = !o.step;
  a.max_norm = o.max_norm.value_or(std::numeric_limits<double>::infinity());
  a.beta1 = o.beta1, a.beta2 = o.beta2, a.eps = o.eps, a.maximize = o.maximize;
  a.result = on_device(result, norm);
  return a;
}

}  // namespace gptcore
