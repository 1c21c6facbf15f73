// What gated_activation.cpp hands to the per-ISA bodies: pointers, sizes and strides, already checked.
#pragma once

#include <cstdint>

namespace gptcore {

struct GatedActivationForward {
  int activation;
  const void *gate, *up;            // up is null in the plain form
  const void *gate_bias, *up_bias;  // may be null
  bool bf16_bias;
  void* y;
  int64_t rows, width;
  int64_t gate_stride, up_stride, y_stride;
};

struct GatedActivationBackward {
  int activation;
  const void *grad_y, *gate, *up;   // up is null in the plain form
  const void *gate_bias, *up_bias;  // may be null
  bool bf16_bias;
  void *dgate, *dup;
  void *dgate_bias, *dup_bias;  // may be null
  bool bf16_dbias;
  int64_t rows, width;
  int64_t grad_y_stride, gate_stride, up_stride, dgate_stride, dup_stride;
};

// [activations bf16?]
struct GatedActivationBodies {
  void (*forward[2])(const GatedActivationForward&);
  void (*backward[2])(const GatedActivationBackward&);
};

}  // namespace gptcore
