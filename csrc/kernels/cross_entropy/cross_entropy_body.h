// What cross_entropy.cpp hands to the per-ISA bodies, already checked. Arrays by row hold the kept rows in
// order.
#pragma once

#include <cstdint>

#include "core/loss_rows.h"

namespace gptcore {

struct CrossEntropyForward {
  const void* logits;
  int64_t stride, rows, classes;
  const int32_t *index, *targets;  // where a kept row lies; its class
  const float* class_weight;       // null: ones
  float *lse, *target_logit;
  float* logit_sum;  // sum of class_weight * logit; null: not wanted
};

// Gradient: softmax_factor * p - uniform * class_weight - (target_share at the target).
struct CrossEntropyBackward {
  const void* logits;
  void* dlogits;
  int64_t stride, out_stride, rows, classes;
  const int32_t *index, *targets;
  const float* class_weight;
  const float *lse, *softmax_factor, *target_share, *uniform;
};

// Where the host does not wait: everything from the tensors, in one struct.
struct CrossEntropyDevice {
  LossRows rows;  // without divisors and row sums, which are scratch
  bool mean, per_row;
  void* loss;  // forward only
  bool bf16_loss;
  int64_t loss_stride;
};

// [logits bf16?]
struct CrossEntropyDeviceBodies {
  void (*forward[2])(const CrossEntropyDevice&);
  void (*backward[2])(const CrossEntropyDevice&);
};

// [logits bf16?]
struct CrossEntropyBodies {
  void (*forward[2])(const CrossEntropyForward&);
  void (*backward[2])(const CrossEntropyBackward&);
};

}  // namespace gptcore
