// Losses over class targets on a device that the host does not wait for: each row's sums and gradient from its logits
// by one block, nothing decided from data. Plain C++; the kernels are in cuda/loss_rows.cuh and cuda/loss_totals.cuh.
// cross_entropy and linear_cross_entropy say in their contracts what is computed.
#pragma once

#include <cstdint>

#include "core/tensor_view.h"

namespace gptcore {

// A vector of f32 or bf16 on the device, or null.
struct ClassVector {
  const void* data;
  bool bf16;
};

inline ClassVector class_vector(const TensorView& tensor) { return {tensor.data, is_bf16(tensor) != 0}; }

struct LossRows {
  const void* logits;  // (rows, classes), what the products are
  int64_t stride, rows, classes;
  const int64_t* targets;
  int64_t ignore_index;
  int64_t first_class, all_classes;  // of a slice; else 0 and classes
  bool slice;
  float scale, soft_cap;  // products to logits: soft_cap tanh((product + bias) scale / soft_cap); no cap: 0
  ClassVector bias, class_weight;
  const float* token_weight;  // null: ones
  double smoothing, z_loss;
  const double* divisors;  // [0] of the loss, [1] of z, [2] the class weights' sum: see LossDivisors

  // By row. lse is read where it is given, else written (and may be null); the others may be null.
  bool lse_given;
  float *lse, *logprobs, *entropy;
  int64_t* predicted;
  double *row_loss, *row_z;

  // The gradient by the products, or null: that of grad_loss * loss + grad_z * z, for each row or all. Without
  // grad_loss or grad_z they count as `missing`.
  void* dlogits;
  int64_t out_stride;
  ClassVector grad_loss;
  const float* grad_z;
  bool grad_per_row;
  int64_t grad_stride;
  float missing;
};

// divisors[0] = sum over kept rows of token_weight class_weight[target], [1] of token_weight (both 1 unless `mean`),
// [2] = sum of class_weight.
struct LossDivisors {
  const int64_t* targets;
  int64_t ignore_index, rows, classes;
  ClassVector class_weight;
  const float* token_weight;
  bool mean;
  double* divisors;
};

// Sums in row order's fixed tree, divided and rounded once. z may be null.
struct LossTotals {
  const double *row_loss, *row_z, *divisors;
  int64_t rows;
  bool per_row;  // no sum: each row's own
  void *loss, *z;
  int64_t loss_stride, z_stride;
  bool bf16_loss;
};

}  // namespace gptcore
