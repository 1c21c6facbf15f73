// What linear_cross_entropy.cpp hands to the per-ISA bodies, already checked. Ignored rows are left out: n
// counts the kept ones, and arrays by row hold them in order, padded with zeros (targets with -1) to a
// multiple of kRowPadding.
#pragma once

#include <cstdint>

#include "core/dtype.h"

namespace gptcore {

constexpr int64_t kRowPadding = 32;

struct LinearCrossEntropyInputs {
  const void *x, *weight;
  DType x_dtype, weight_dtype;
  int64_t x_stride, weight_stride;
  const int32_t* rows;     // where a kept row lies in x and dx
  const int32_t* targets;  // its class
  int64_t n, c, v;
  float scale;
};

struct LinearCrossEntropyForward : LinearCrossEntropyInputs {
  float *lse, *target_logit;
  float* logit_sum;  // null: not wanted
};

// The gradient of the unscaled logits: softmax_factor * p - uniform - (target_share at the target).
struct LinearCrossEntropyBackward : LinearCrossEntropyInputs {
  const float *lse, *softmax_factor, *target_share, *uniform;
  void* dx;  // x's type; null: not wanted
  int64_t dx_stride;
  void* dweight;  // null: not wanted
  int64_t dweight_stride;
  DType dweight_dtype;
  bool accumulate;  // dweight is added to
};

struct LinearCrossEntropyBodies {
  void (*forward)(const LinearCrossEntropyForward&);
  void (*backward)(const LinearCrossEntropyBackward&);
};

}  // namespace gptcore
