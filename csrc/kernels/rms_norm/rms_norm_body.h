// What rms_norm.cpp hands to the per-ISA bodies: pointers, sizes and strides, already checked.
#pragma once

#include <cstdint>

namespace gptcore {

struct RmsNormForward {
  const void *x, *residual, *weight;  // residual, weight may be null
  bool bf16_weight;
  void *y, *h;  // h is null without residual
  float* rstd;  // may be null
  int64_t rows, width;
  int64_t x_stride, residual_stride, y_stride, h_stride;
  float eps, weight_offset;
};

struct RmsNormBackward {
  const void *grad_y, *grad_h, *h, *weight;  // grad_h, weight may be null
  const float* rstd;
  void* dx;
  void* dweight;  // may be null
  bool bf16_weight, bf16_dweight;
  int64_t rows, width;
  int64_t grad_y_stride, grad_h_stride, h_stride, dx_stride;
  float weight_offset;
};

// [activations bf16?]
struct RmsNormBodies {
  void (*forward[2])(const RmsNormForward&);
  void (*backward[2])(const RmsNormBackward&);
};

}  // namespace gptcore
