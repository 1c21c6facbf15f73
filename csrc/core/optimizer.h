// What optimizers share beside their lists of tensors.
#pragma once

#include <cmath>
#include <optional>
#include <string>
#include <vector>

#include "core/check.h"
#include "core/step_number.h"

namespace gptcore {

// What clipping by the global norm multiplies gradients with; torch adds the same 1e-6.
inline double clip_factor(const std::optional<double>& max_norm, double norm) {
  return max_norm && *max_norm < norm + 1e-6 ? *max_norm / (norm + 1e-6) : 1.0;
}

inline void check_clip(const Checker& check, const std::optional<double>& max_norm) {
  if (max_norm) check.number(*max_norm > 0, "max_norm", *max_norm, "a number above 0, or None");
}

inline std::vector<int64_t> sizes_of(const std::vector<TensorView>& tensors) {
  std::vector<int64_t> sizes;
  for (const TensorView& tensor : tensors) sizes.push_back(tensor.numel());
  return sizes;
}

// One f32 for each parameter, or none at all.
inline void check_steps(const Checker& check, const std::vector<TensorView>& steps, size_t expected) {
  if (!steps.empty()) check.length(steps.size(), "steps", expected);
  for (size_t i = 0; i < steps.size(); ++i) {
    const TensorView& step = steps[i];
    if (step.defined && step.device == check.device() && step.dtype == DType::f32 && step.numel() == 1 &&
        !step.readonly) {
      continue;
    }
    const std::string name = "steps[" + std::to_string(i) + "]";
    check.output(step, name.c_str(), {DType::f32});
    check.fail(name.c_str(), describe(step), "one element");
  }
}

inline std::vector<float*> counts_of(const std::vector<TensorView>& steps) {
  std::vector<float*> counts;
  for (const TensorView& view : steps) counts.push_back(view.as<float>());
  return counts;
}

}  // namespace gptcore
