// What adamw.cpp hands to the per-ISA bodies: pointers and numbers, already checked.
#pragma once

#include <cstdint>

#include "core/dtype.h"

namespace gptcore {

struct AdamwTensor {
  float *param, *exp_avg, *exp_avg_sq;
  const void* grad;
  bf16* copy;  // may be null
  bool bf16_grad;
  float keep;  // 1 - lr * weight_decay
};

// A piece of one tensor, the unit of work and of the norm's sums.
struct AdamwChunk {
  int64_t tensor, begin, size;
};

struct AdamwNumbers {
  float grad_factor;          // k
  float beta2, rest1, rest2;  // rest: 1 - beta
  float step_size;            // lr / (1 - beta1^step)
  float root_factor, eps;     // 1 / sqrt(1 - beta2^step)
};

struct AdamwBodies {
  // sums[i]: sum of squares of chunk i's gradient; finite[i]: whether all its elements are.
  void (*square_sums)(const AdamwTensor* tensors, const AdamwChunk* chunks, int64_t count, double* sums,
                      bool* finite);
  void (*update)(const AdamwTensor* tensors, const AdamwChunk* chunks, int64_t count,
                 const AdamwNumbers& numbers);
};

}  // namespace gptcore
