// What grad_norm.cpp hands to the per-ISA bodies: pointers, already checked.
#pragma once

#include "core/chunks.h"
#include "core/device_number.h"

namespace gptcore {

// Elements whose squares add up in f32.
constexpr int64_t kSumElements = 16384;

struct GradNormTensor {
  const void* data;
  bool bf16;
};

// Blocks that follow each other in one tensor; all are of equal size but a last one that ends with its tensor.
struct GradNormTask {
  Chunk chunk;
  int64_t first;  // the number of its first block, of those of all tensors
};

// All of it at once, for another device.
struct GradNormStep {
  const GradNormTensor* tensors;
  const int64_t* sizes;
  int64_t count, block, blocks;  // tensors; elements of a block; blocks of all tensors
  DeviceNumber scale;
  double* sums;         // of scaled gradients; null where only the norm is wanted
  DeviceResult result;  // of the norm; its norm is null where only sums are wanted
};

struct GradNormBodies {
  // sums[j]: sum of squares of block j; finite[i]: whether all elements of task i are.
  void (*square_sums)(const GradNormTensor* tensors, const GradNormTask* tasks, int64_t count, int64_t block,
                      double* sums, bool* finite);
  void (*sum)(const GradNormStep& step);
};

}  // namespace gptcore
