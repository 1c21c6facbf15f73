// What all forms of Adam work out on the device before an update: the gradients' factor, and for each tensor the
// corrections of its moments by its own count of updates.
#pragma once

#include <algorithm>
#include <cmath>

#include "core/adam_step.h"
#include "core/cuda/step_control.cuh"
#include "core/cuda/tensor_table.cuh"

namespace gptcore::cuda {

struct AdamFactors {
  float step_size;    // lr / (1 - beta1^step)
  float root_factor;  // 1 / sqrt(1 - beta2^step)
  uint32_t step;
};

struct AdamControl {
  double lr, factor;  // factor: of the gradients
  bool skip;
};

constexpr int kAdamThreads = 128;
constexpr int64_t kAdamCounts = kTableBytes / static_cast<int64_t>(sizeof(float*)) - 64;

struct AdamCounts {
  float* at[kAdamCounts];
};

struct AdamRule {
  GradientRule gradient;
  DeviceNumber step, lr;
  double beta1, beta2;
  bool counted;
  DeviceResult result;
};

// A thread for each of `count` tensors; the first also for what they share.
static __global__ void __launch_bounds__(kAdamThreads)
    adam_numbers(const __grid_constant__ AdamCounts counts, int count, const __grid_constant__ AdamRule a,
                 AdamControl* control, AdamFactors* factors) {
  const int i = static_cast<int>(blockIdx.x) * kAdamThreads + static_cast<int>(threadIdx.x);
  if (i >= count) return;
  const GradientFactor gradient = factor_of(a.gradient);
  const double lr = read_number(a.lr);
  if (i == 0 && control) {
    *control = {lr, gradient.factor, gradient.skip};
    write_result(a.result, read_number(a.gradient.norm));
  }
  float* const own = counts.at[i];
  const double step = a.counted ? static_cast<double>(*own) + 1.0 : read_number(a.step);
  factors[i] = {static_cast<float>(lr / (1.0 - pow(a.beta1, step))),
                static_cast<float>(1.0 / sqrt(1.0 - pow(a.beta2, step))), static_cast<uint32_t>(step)};
  if (own && !gradient.skip) *own = static_cast<float>(step);
}

// Writes *control and factors[0 .. count - 1], and moves the counts on.
inline void start_adam_numbers(const AdamStep& a, int64_t count, AdamControl* control, AdamFactors* factors) {
  const AdamRule rule = {
      {a.scale, a.norm, a.max_norm, a.maximize}, a.step, a.lr, a.beta1, a.beta2, a.counted, a.result};
  AdamCounts counts;
  for (int64_t begin = 0; begin < count; begin += kAdamCounts) {
    const int64_t size = std::min(kAdamCounts, count - begin);
    for (int64_t i = 0; i < size; ++i) counts.at[i] = a.steps ? a.steps[begin + i] : nullptr;
    const auto blocks = static_cast<unsigned>((size + kAdamThreads - 1) / kAdamThreads);
    launch<&adam_numbers>({dim3(blocks), dim3(kAdamThreads)}, counts, static_cast<int>(size), rule,
                          begin == 0 ? control : static_cast<AdamControl*>(nullptr), factors + begin);
  }
}

}  // namespace gptcore::cuda
