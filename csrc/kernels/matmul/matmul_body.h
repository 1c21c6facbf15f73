// What matmul.cpp hands to the per-ISA bodies, already checked.
#pragma once

#include <cstdint>

#include "core/dtype.h"

namespace gptcore {

struct MatmulArgs {
  const void *a, *b;
  const float* bias;  // of n, or null; never with accumulate
  void* out;
  int64_t m, n, k;
  int64_t a_stride, b_stride, out_stride;  // of the dimension that is not contiguous
  bool a_depth_lines, b_depth_lines;       // the contiguous dimension is k
  bool accumulate, f32_out;
  DType dtype;
};

// Rows up to which the body for few rows is used: what a decoding batch has, and four AMX accumulators wide.
constexpr int64_t kFewRows = 64;

// Products up to which one thread is done before a second one has woken.
constexpr int64_t kSerialProducts = 1 << 18;

struct MatmulBodies {
  void (*few_rows)(const MatmulArgs&);         // m <= kFewRows, both operands with contiguous depth
  void (*few_rows_across)(const MatmulArgs&);  // the same with rows of b contiguous, m > 1
  void (*one_row)(const MatmulArgs&);          // m = 1, rows of b contiguous
  void (*packed)(const MatmulArgs&);
};

}  // namespace gptcore
