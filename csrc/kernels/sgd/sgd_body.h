// What sgd.cpp hands to the per-ISA bodies: pointers and numbers, already checked.
#pragma once

#include "core/chunks.h"
#include "core/device_number.h"
#include "core/dtype.h"

namespace gptcore {

struct SgdTensor {
  float* param;
  float* buffer;  // null without momentum
  bf16* copy;     // may be null
  const void* grad;
  bool bf16_grad, first;
  float l2;           // weight_decay
  float keep, share;  // of the buffer and of the gradient in it: momentum and 1 - dampening, 0 and 1 at first
};

struct SgdNumbers {
  float grad_factor;  // k
  float lr, momentum;
  bool nesterov;
};

// What another device works its numbers out from.
struct SgdStep {
  DeviceNumber lr, scale, norm;
  bool normed;      // there is a norm
  double max_norm;  // infinity: no clip
  float momentum;
  bool nesterov, maximize;
  DeviceResult result;
};

struct SgdBodies {
  void (*update)(const SgdTensor* tensors, const Chunk* chunks, int64_t count, const SgdNumbers& numbers);
  // All of it at once, for another device.
  void (*step)(const SgdTensor* tensors, const int64_t* sizes, int64_t count, const SgdStep& step);
};

}  // namespace gptcore
