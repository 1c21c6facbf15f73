// A tensor (..., C) seen as N rows of C elements: what ops along the last dimension want, of any number of
// dimensions, so that Python need not reshape (a microsecond a tensor).
#pragma once

#include <cmath>

#include "core/check.h"

namespace gptcore {

struct Rows {
  int64_t count = 0;   // N
  int64_t width = 0;   // C
  int64_t stride = 0;  // elements from one row to the next
};

// Checks that the last dimension has stride 1 and that all rows lie at one stride.
inline Rows rows_of(const Checker& check, const TensorView& tensor, const char* argument) {
  if (tensor.ndim < 1) check.fail(argument, "a scalar", "at least 1 dimension");
  check.last_contiguous(tensor, argument);
  Rows rows;
  rows.width = rows.stride = tensor.size(-1);
  rows.count = 1;
  bool first = true;
  for (int d = tensor.ndim - 2; d >= 0; --d) {
    if (tensor.sizes[d] != 1 && tensor.numel() > 0) {
      if (first) {
        rows.stride = tensor.stride(d);
        first = false;
      } else if (tensor.stride(d) != rows.stride * rows.count) {
        check.fail(argument, "leading dimensions that do not merge into one",
                   "rows at one stride (a contiguous tensor or a slice of its last dimension)");
      }
    }
    rows.count *= tensor.sizes[d];
  }
  return rows;
}

// The stride of the rows of a tensor that must be like `like`.
inline int64_t checked_stride(const Checker& check, const TensorView& tensor, const char* argument,
                              const TensorView& like, const char* like_name) {
  check.input(tensor, argument, {like.dtype});
  check.same_shape(tensor, argument, like, like_name);
  return rows_of(check, tensor, argument).stride;
}

// A contiguous vector of `size` elements, such as a weight of each column or a statistic of each row.
inline void check_vector(const Checker& check, const TensorView& tensor, const char* argument, int64_t size,
                         std::initializer_list<DType> types) {
  check.input(tensor, argument, types);
  check.shape(tensor, argument, {size});
  check.contiguous(tensor, argument);
}

// What a norm adds to its weight.
inline void check_weight_offset(const Checker& check, float offset, const TensorView& weight) {
  if (!std::isfinite(offset)) check.fail("weight_offset", std::to_string(offset), "a finite number");
  if (offset != 0 && !weight) {
    check.fail("weight_offset", std::to_string(offset) + " without 'weight'", "0, or a weight to add it to");
  }
}

}  // namespace gptcore
