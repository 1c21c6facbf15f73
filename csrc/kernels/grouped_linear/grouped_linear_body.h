// What grouped_linear.cpp hands to the per-ISA bodies, already checked: one expert's product and a block of it.
#pragma once

#include <cstdint>

#include "core/dtype.h"

namespace gptcore {

// out (+)= a b (+ bias). A matrix is lines of contiguous elements, `stride` apart; depth_lines: they run along k.
struct GroupProduct {
  const void *a, *b, *bias;  // bias of n, or null
  void* out;
  int64_t m, n, k;
  int64_t a_stride, b_stride, out_stride;
  bool a_depth_lines, b_depth_lines;
  bool accumulate, f32_out, f32_bias;
  bool past_caches;  // all experts' results are worth storing past the caches
  DType dtype;
};

// Rows and columns of one expert's result: a task, wholly one thread's.
struct GroupBlock {
  int64_t expert;
  int64_t row, rows, column, columns;
};

// The size of blocks; no bit depends on it.
struct GroupCut {
  int64_t rows, columns, least_columns;
};

struct ColumnSums {
  const void* in;
  void* out;
  int64_t rows, stride, columns;
  bool f32_in, f32_out;
};

struct GroupedBodies {
  GroupCut (*cut)(const GroupProduct&);
  void (*block)(const GroupProduct&, const GroupBlock&);
  void (*column_sums)(const ColumnSums&);
  bool (*past_caches)(const void* out, int64_t bytes);
};

}  // namespace gptcore
