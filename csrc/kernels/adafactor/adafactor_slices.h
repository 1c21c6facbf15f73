// How slices of wholes are checked and cut for adafactor_blocks.cpp.
#pragma once

#include <string>
#include <vector>

#include "core/tensor_lists.h"
#include "kernels/adafactor/adafactor_blocks_body.h"
#include "kernels/adafactor/adafactor_step.h"

namespace gptcore {
namespace {

// Rows of one matrix (or elements of a flat tensor) of slice `slice`; kernels see it as a tensor of its own.
struct SlicePart {
  size_t slice;
  int64_t matrix;
};

// A block: chunks of a part, which lie in order.
struct SliceBlock {
  int64_t part, row, rows, row_chunk, row_chunks;
  size_t chunk, chunks;  // the first of them, and how many
  int64_t number;        // among its slice's
};

// What the phases run over: factored parts, chunks and blocks before flat ones.
struct SlicePlan {
  std::vector<SliceOf> slices;
  std::vector<AdafactorTensor> tensors;  // one for each part
  std::vector<SlicePart> parts;
  std::vector<AdafactorChunk> chunks;
  std::vector<SliceBlock> blocks;
  size_t factored_chunks = 0, factored_blocks = 0, factored_parts = 0;
};

inline std::string item_name(const char* list, size_t i) {
  return std::string(list) + "[" + std::to_string(i) + "]";
}

// list[i]: of so many elements in any shape, or where there is a width in rows of it.
inline void check_size(const Checker& check, const std::vector<TensorView>& list, const char* name, size_t i,
                       DType dtype, int64_t count, int64_t width, bool written) {
  const TensorView& tensor = list[i];
  const bool shaped = !width || (tensor.ndim == 2 && tensor.size(1) == width);
  const bool sized = tensor.defined && shaped && tensor.numel() == count;
  const bool here = tensor.device == Device::cpu && check.device() == Device::cpu;
  if (sized && here && tensor.dtype == dtype && tensor.is_contiguous() && !(written && tensor.readonly))
    return;
  const std::string full = item_name(name, i);
  check.input(tensor, full.c_str(), {dtype});
  check.contiguous(tensor, full.c_str());
  if (written) check.writable(tensor, full.c_str());
  if (width) check.shape(tensor, full.c_str(), {count / width, width});
  if (!sized) check.fail(full.c_str(), describe(tensor), std::to_string(count) + " elements");
}

inline void check_slice(const Checker& check, size_t i, const SliceOf& s) {
  const AdafactorSlice& at = s.at;
  const auto fail = [&](const char* expected) {
    check.fail(item_name("slices", i).c_str(),
               "[" + std::to_string(at.start) + ", " + std::to_string(at.start + s.size) + ") of " +
                   std::to_string(at.numel) + " elements in matrices of " + std::to_string(at.rows) + " x " +
                   std::to_string(at.cols),
               expected);
  };
  if (at.start < 0 || at.numel < 0 || s.size > at.numel - at.start) fail("a slice within its whole");
  if (s.factored) {
    if (at.block < 1 || at.rows < 0 || at.cols < 0) fail("matrices cut into blocks of 1 row or more");
    if (at.numel && (at.rows * at.cols == 0 || at.numel % (at.rows * at.cols))) fail("whole matrices");
  }
  if (s.size && !(s.is_border(at.start) && s.is_border(at.start + s.size))) {
    fail(s.factored ? "ends between blocks of rows" : "ends at multiples of 1024");
  }
}

// Tensors as they come, and what their slices are of.
inline std::vector<AdafactorTensor> checked_slices(const Checker& check, const AdafactorSlices& call,
                                                   std::vector<SliceOf>* slices) {
  const AdafactorLists& l = call.lists;
  const size_t count = l.params.size();
  std::vector<AdafactorTensor> tensors(count);
  take_list(check, l.params, "params", l.params, &AdafactorTensor::param, &tensors);
  take_gradients(check, l.grads, l.params, call.weight_decay, &tensors);
  check.length(l.row_vars.size(), "row_vars", count);
  check.length(l.col_vars.size(), "col_vars", count);
  check.length(l.variances.size(), "variances", count);
  check.length(call.slices.size(), "slices", count);
  if (!l.exp_avgs.empty()) {
    take_list(check, l.exp_avgs, "exp_avgs", l.params, &AdafactorTensor::exp_avg, &tensors);
  }
  if (!l.copies.empty()) take_list(check, l.copies, "copies", l.params, &AdafactorTensor::copy, &tensors);
  for (size_t i = 0; i < count; ++i) {
    const SliceOf s{call.slices[i], l.params[i].numel(), !l.variances[i].defined};
    check_slice(check, i, s);
    slices->push_back(s);
    if (!s.factored) {
      check.item(l.variances, "variances", i, l.params[i], {DType::f32}, true);
      tensors[i].variance = l.variances[i].as<float>();
      continue;
    }
    if (s.at.numel == 0) continue;
    check_size(check, l.row_vars, "row_vars", i, DType::f32, s.size / s.at.cols, 0, true);
    check_size(check, l.col_vars, "col_vars", i, DType::f32, s.matrices() * s.at.cols, 0, true);
    tensors[i].row_var = l.row_vars[i].as<float>();
    tensors[i].col_var = l.col_vars[i].as<float>();
  }
  return tensors;
}

inline void cut_flat(const AdafactorTensor& whole, size_t slice, SlicePlan* plan) {
  const SliceOf& s = plan->slices[slice];
  const int64_t part = static_cast<int64_t>(plan->parts.size());
  AdafactorTensor t = whole;
  t.cols = s.size;
  t.row_blocks = 1, t.col_blocks = s.own_blocks();
  for (int64_t b = 0; b < t.col_blocks; ++b) {
    const int64_t col = b * kFlatBlock, cols = std::min(kFlatBlock, s.size - col);
    plan->blocks.push_back({part, 0, 1, 0, 1, plan->chunks.size(), 1, b});
    plan->chunks.push_back({part, 0, 0, 1, col, cols, 0, b});
  }
  plan->tensors.push_back(t);
  plan->parts.push_back({slice, 0});
}

// One block of a part in chunks, from the block's first row on.
inline void cut_block(int64_t part, int64_t row, int64_t rows, int64_t number, AdafactorTensor* t,
                      SlicePlan* plan) {
  const int64_t width = chunk_cols(t->cols), height = chunk_rows(t->cols);
  const int64_t row_chunks = blocks(rows, height);
  plan->blocks.push_back({part, row, rows, t->row_blocks, row_chunks, plan->chunks.size(),
                          static_cast<size_t>(row_chunks * t->col_blocks), number});
  for (int64_t r = 0; r < row_chunks; ++r) {
    for (int64_t c = 0; c < t->col_blocks; ++c) {
      plan->chunks.push_back({part, 0, row + r * height, std::min(height, rows - r * height), c * width,
                              std::min(width, t->cols - c * width), t->row_blocks + r, c});
    }
  }
  t->row_blocks += row_chunks;
}

// One part for each matrix of which there are rows here.
inline void cut_rows(const AdafactorTensor& whole, size_t slice, SlicePlan* plan) {
  const SliceOf& s = plan->slices[slice];
  const int64_t all = s.size / s.at.cols, first = s.at.start / s.at.cols;
  int64_t number = 0;
  for (int64_t begin = 0; begin < all;) {
    const int64_t matrix = (first + begin) / s.at.rows, row = (first + begin) % s.at.rows;
    const int64_t part = static_cast<int64_t>(plan->parts.size());
    AdafactorTensor t = part_of(whole, begin * s.at.cols);
    t.row_var += begin, t.col_var += matrix * s.at.cols;
    t.rows = std::min(all - begin, s.at.rows - row), t.cols = s.at.cols;
    t.row_blocks = 0, t.col_blocks = blocks(t.cols, chunk_cols(t.cols));
    for (int64_t r = 0; r < t.rows; r += s.at.block) {
      cut_block(part, r, std::min(s.at.block, t.rows - r), number++, &t, plan);
    }
    plan->tensors.push_back(t);
    plan->parts.push_back({slice, matrix});
    begin += t.rows;
  }
}

// Cuts `tensors`, one for each of the plan's slices.
inline void cut(const std::vector<AdafactorTensor>& tensors, SlicePlan* plan) {
  for (size_t i = 0; i < tensors.size(); ++i) {
    if (plan->slices[i].factored && plan->slices[i].size) cut_rows(tensors[i], i, plan);
  }
  plan->factored_chunks = plan->chunks.size();
  plan->factored_blocks = plan->blocks.size();
  plan->factored_parts = plan->parts.size();
  for (size_t i = 0; i < tensors.size(); ++i) {
    if (!plan->slices[i].factored) cut_flat(tensors[i], i, plan);
  }
}

}  // namespace
}  // namespace gptcore
