// What layer_norm.cpp hands to the per-ISA bodies: pointers, sizes and strides, already checked.
#pragma once

#include <cstdint>

namespace gptcore {

struct LayerNormForward {
  const void *x, *residual, *weight, *bias;  // residual, weight, bias may be null
  bool bf16_weight;                          // of weight and bias
  void *y, *h;                               // h is null without residual
  float *mean, *rstd;                        // may be null
  int64_t rows, width;
  int64_t x_stride, residual_stride, y_stride, h_stride;
  float eps, weight_offset;
};

struct LayerNormBackward {
  const void *grad_y, *grad_h, *h, *weight;  // grad_h, weight may be null
  const float *mean, *rstd;
  void* dx;
  void *dweight, *dbias;           // may be null
  bool bf16_weight, bf16_dweight;  // bf16_dweight: of dweight and dbias
  int64_t rows, width;
  int64_t grad_y_stride, grad_h_stride, h_stride, dx_stride;
  float weight_offset;
};

// [activations bf16?]
struct LayerNormBodies {
  void (*forward[2])(const LayerNormForward&);
  void (*backward[2])(const LayerNormBackward&);
};

}  // namespace gptcore
