// Numbers of an update as kernels of another device take and leave them (core/step_number.h). Plain C++.
#pragma once

#include "core/dtype.h"

namespace gptcore {

// A kernel reads `at`, one f32, f64 or i64, or where that is null knows the value.
struct DeviceNumber {
  double value = 0;
  const void* at = nullptr;
  DType dtype = DType::f64;
};

// Where it writes the norm and whether a gradient was not finite; either may be null.
struct DeviceResult {
  double* norm = nullptr;
  bool* found_inf = nullptr;
};

}  // namespace gptcore
