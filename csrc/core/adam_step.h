// One update of Adam in any of its forms, as kernels of another device are told of it. Plain C++.
#pragma once

#include "core/device_number.h"

namespace gptcore {

struct AdamStep {
  // This update's number; unused where `steps` are counts of updates before it.
  DeviceNumber step, lr, scale, norm;
  float* const* steps;  // of each tensor, null entries: none. Written where the update is applied
  bool counted;         // the update's number is one more than the tensor's count
  double max_norm;      // infinity: no clip
  double beta1, beta2, eps;
  bool maximize;
  DeviceResult result;
};

}  // namespace gptcore
