// What adafactor_blocks.cpp hands to another device's bodies: slices of wholes, already checked, and how they are counted.
#pragma once

#include "kernels/adafactor/adafactor_body.h"

namespace gptcore {

struct AdafactorSlice {
  int64_t numel;              // of the whole
  int64_t rows, cols, block;  // of each of its matrices, where factored
  int64_t start;
};

constexpr int64_t kFlatBlock = 1024;

// One whole, and what of it is here.
struct SliceOf {
  AdafactorSlice at;
  int64_t size = 0;  // elements here
  bool factored = false;

  int64_t matrices() const { return factored && at.numel ? at.numel / (at.rows * at.cols) : 0; }
  int64_t matrix_blocks() const { return blocks(at.rows, at.block); }
  int64_t width() const { return factored ? 2 * at.cols + 3 : 2; }
  int64_t all_blocks() const {
    return factored ? matrices() * matrix_blocks() : blocks(at.numel, kFlatBlock);
  }
  // Of this element, counted over the whole.
  int64_t block_of(int64_t element) const {
    if (!factored) return blocks(element, kFlatBlock);
    const int64_t row = element / at.cols;
    return row / at.rows * matrix_blocks() + blocks(row % at.rows, at.block);
  }
  int64_t own_blocks() const { return size ? block_of(at.start + size) - block_of(at.start) : 0; }
  // Whether a block begins here, or nothing follows.
  bool is_border(int64_t element) const {
    if (element == at.numel) return true;
    if (!factored) return element % kFlatBlock == 0;
    return element % at.cols == 0 && element / at.cols % at.rows % at.block == 0;
  }
};

// The part of `whole` that begins with this element of the slice.
inline AdafactorTensor part_of(const AdafactorTensor& whole, int64_t element) {
  AdafactorTensor t = whole;
  t.param += element;
  t.grad = static_cast<const char*>(t.grad) + element * (t.bf16_grad ? 2 : 4);
  if (t.variance) t.variance += element;
  if (t.exp_avg) t.exp_avg += element;
  if (t.copy) t.copy += element;
  return t;
}

// A phase of a call. Of the lists a phase has its own alone, of which the others are null.
struct AdafactorPhase {
  const AdafactorTensor* tensors;  // slices; row_var is of its rows, col_var of the whole
  const SliceOf* slices;
  int64_t count;
  const AdafactorStep& step;
  double *const *statistics, *const *totals, *const *sums;
};

struct AdafactorBlocksBodies {
  void (*statistics)(const AdafactorPhase& phase);
  void (*updates)(const AdafactorPhase& phase);
  void (*apply)(const AdafactorPhase& phase);
};

}  // namespace gptcore
