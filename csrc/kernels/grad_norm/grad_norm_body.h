// What grad_norm.cpp hands to the per-ISA bodies: pointers, already checked.
#pragma once

#include "core/chunks.h"

namespace gptcore {

struct GradNormTensor {
  const void* data;
  bool bf16;
};

struct GradNormBodies {
  // sums[i]: sum of squares of chunk i; finite[i]: whether all its elements are.
  void (*square_sums)(const GradNormTensor* tensors, const Chunk* chunks, int64_t count, double* sums,
                      bool* finite);
};

}  // namespace gptcore
