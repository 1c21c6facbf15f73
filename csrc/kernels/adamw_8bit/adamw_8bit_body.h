// What adamw_8bit.cpp hands to the per-ISA bodies: pointers and numbers, already checked.
#pragma once

#include "core/adam_step.h"
#include "core/chunks.h"
#include "core/dtype.h"

namespace gptcore {

// Elements that share a scale: 2 KiB of moments in f32, which stay in registers and the first level of cache.
constexpr int64_t kQuantBlock = 256;

struct Adamw8bitTensor {
  void* param = nullptr;
  const void* grad = nullptr;
  uint8_t *exp_avg = nullptr, *exp_avg_sq = nullptr;
  float *exp_avg_scale = nullptr, *exp_avg_sq_scale = nullptr;
  bf16* copy = nullptr;
  bool bf16_grad = false, bf16_param = false;
  float keep = 1;  // 1 - lr * weight_decay
  // Of the random bits: the tensor's number, and the first element's position in what it is a slice of.
  uint32_t number = 0;
  int64_t start = 0;
};

struct Adamw8bitNumbers {
  float beta1, beta2;
  float mean_factor, square_root;  // of g in m: k (1 - beta1), and in the root
                                   // of what v gains: k sqrt(1 - beta2)
  float step_size;                 // lr / (1 - beta1^step)
  float root_factor, eps;          // 1 / sqrt(1 - beta2^step)
  uint64_t seed;
  uint32_t step;
};

struct Adamw8bitBodies {
  void (*update)(const Adamw8bitTensor* tensors, const Chunk* chunks, int64_t count,
                 const Adamw8bitNumbers& numbers);
  // All of it at once, for another device; keep of the tensors is not set.
  void (*step)(const Adamw8bitTensor* tensors, const int64_t* sizes, const double* weight_decay,
               int64_t count, uint64_t seed, const AdamStep& step);
};

}  // namespace gptcore
