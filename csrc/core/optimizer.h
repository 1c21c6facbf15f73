// What optimizers share beside their lists of tensors.
#pragma once

#include <cmath>
#include <optional>
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

}  // namespace gptcore
