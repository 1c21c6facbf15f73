// What optimizers share beside their lists of tensors.
#pragma once

#include <cmath>
#include <optional>

#include "core/check.h"

namespace gptcore {

// What clipping by the global norm multiplies gradients with; torch adds the same 1e-6.
inline double clip_factor(const std::optional<double>& max_norm, double norm) {
  return max_norm && *max_norm < norm + 1e-6 ? *max_norm / (norm + 1e-6) : 1.0;
}

// The settings of Adam in any of its forms.
template <class Options>
void check_adam_options(const Checker& check, const Options& o) {
  if (o.step < 1) check.fail("step", std::to_string(o.step), "1 or more");
  check.number(o.lr >= 0 && std::isfinite(o.lr), "lr", o.lr, "a finite number, 0 or more");
  check.number(o.beta1 >= 0 && o.beta1 < 1, "beta1", o.beta1, "a number in [0, 1)");
  check.number(o.beta2 >= 0 && o.beta2 < 1, "beta2", o.beta2, "a number in [0, 1)");
  check.number(o.eps >= 0 && std::isfinite(o.eps), "eps", o.eps, "a finite number, 0 or more");
  check.number(o.grad_scale > 0 && std::isfinite(o.grad_scale), "grad_scale", o.grad_scale,
               "a finite number above 0");
  if (o.max_norm) check.number(*o.max_norm > 0, "max_norm", *o.max_norm, "a number above 0, or None");
}

}  // namespace gptcore
