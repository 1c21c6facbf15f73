// What adamw.cpp hands to the per-ISA bodies: pointers and numbers, already checked.
#pragma once

#include "core/adam_step.h"
#include "core/chunks.h"
#include "core/dtype.h"

namespace gptcore {

struct AdamwTensor {
  float* param;  // null where the parameter is split
  bf16* weight;  // upper half of a split parameter
  int16_t* low;  // and what is left of it
  float *exp_avg, *exp_avg_sq;
  float* max_exp_avg_sq;  // may be null
  const void* grad;
  bf16* copy;  // may be null
  bool bf16_grad;
  float keep, l2;  // decoupled: 1 - lr * weight_decay and 0, else 1 and weight_decay
};

struct AdamwNumbers {
  float grad_factor;          // k
  float beta2, rest1, rest2;  // rest: 1 - beta
  float step_size;            // lr / (1 - beta1^step)
  float root_factor, eps;     // 1 / sqrt(1 - beta2^step)
};

struct AdamwBodies {
  void (*update)(const AdamwTensor* tensors, const Chunk* chunks, int64_t count, const AdamwNumbers& numbers);
  // All of it at once, for another device; keep and l2 of the tensors are not set.
  void (*step)(const AdamwTensor* tensors, const int64_t* sizes, const double* weight_decay, int64_t count,
               bool decoupled, const AdamStep& step);
};

}  // namespace gptcore
