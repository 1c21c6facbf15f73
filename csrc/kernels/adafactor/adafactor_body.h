// What adafactor.cpp hands to the per-ISA bodies: pointers and numbers, already checked.
#pragma once

#include <cstdint>

#include "core/device_number.h"
#include "core/dtype.h"

namespace gptcore {

inline int64_t blocks(int64_t size, int64_t block) { return (size + block - 1) / block; }

struct AdafactorTensor {
  float* param = nullptr;
  const void* grad = nullptr;
  float *row_var = nullptr, *col_var = nullptr;  // of factored tensors
  float* variance = nullptr;                     // of others
  float* exp_avg = nullptr;
  bf16* copy = nullptr;
  bool bf16_grad = false;
  int64_t slices = 1, rows = 1, cols = 0;  // matrices, and their sizes; 1, 1, N where unfactored
  int64_t row_blocks = 0, col_blocks = 0;  // chunks that a matrix is cut into
  // Scratch of factored tensors: sums of g^2, then 1 / sqrt(R / mean R) and 1 / sqrt(C).
  float* row_sums = nullptr;     // (slices, col_blocks, rows)
  float* col_sums = nullptr;     // (slices, row_blocks, cols)
  float* ratio_sums = nullptr;   // the same of g^2 / R
  float* row_factors = nullptr;  // (slices, rows)
  float* col_factors = nullptr;  // (slices, cols)
  float keep = 1, scale = 0;     // p = p * keep - scale * g / sqrt(V)
  bool summed = false;           // the sum of squares of g / sqrt(V) is known
};

// A piece of one matrix, the unit of work and of sums.
struct AdafactorChunk {
  int64_t tensor, slice, row, rows, col, cols, row_block, col_block;
};

// One matrix's rows (column < 0), or some of its columns, whose sums of squares become states and factors.
struct AdafactorFactors {
  int64_t tensor, slice, column, columns;
  // Results. Rows: what R is divided by, its mean; columns: the sum over them of ratio_sums / C.
  double sum = 0;
  double least = __builtin_inf();  // the smallest R or C among those with gradients
};

struct AdafactorNumbers {
  double beta2, rest2;   // rest: 1 - beta
  double square_factor;  // k^2
  double square_added;   // eps1 where it is added to squares, else 0
  double mean_floor;     // at least this is mean R: eps1 where not added, else 0
  float beta1, rest1;
  float root_limit;  // at most this is 1 / sqrt(V): 1 / eps1 where not added, else infinity
};

// All of a step, for another device.
struct AdafactorStep {
  DeviceNumber step_size, beta2, decay_factor, scale, norm;
  bool each_step_size, each_beta2;  // arrays of one f64 for each tensor
  bool known;                       // the norm
  double max_norm, clip_threshold;  // infinity: none
  double eps1, eps2;
  float beta1;
  bool eps_added, scale_parameter, scaled_decay, maximize;
  const double* weight_decay;
  float* const* steps;  // counts, moved on where the update is applied; null: none
  DeviceResult result;
};

struct AdafactorBodies {
  // Sums of g^2 over chunk i, and where its tensor is factored by rows and columns, and of g^2 / R by columns (of
  // use where square_factor is right already). totals[i] over all, infinite or NaN where an element is.
  void (*squares)(const AdafactorTensor* tensors, const AdafactorChunk* chunks, int64_t count,
                  const AdafactorNumbers& numbers, double* totals);
  // States and factors from those sums.
  void (*factors)(const AdafactorTensor* tensors, AdafactorFactors* tasks, int64_t count,
                  const AdafactorNumbers& numbers);
  // Sums of p^2 and of (g / sqrt(V))^2 over each chunk, the latter where not known; either may be null.
  void (*scales)(const AdafactorTensor* tensors, const AdafactorChunk* chunks, int64_t count,
                 const AdafactorNumbers& numbers, double* param_sums, double* update_sums);
  void (*update)(const AdafactorTensor* tensors, const AdafactorChunk* chunks, int64_t count,
                 const AdafactorNumbers& numbers);
  // Another device's, in place of the others; keep, scale and the scratch of the tensors are not set.
  void (*step)(const AdafactorTensor* tensors, int64_t count, const AdafactorStep& step);
};

}  // namespace gptcore
