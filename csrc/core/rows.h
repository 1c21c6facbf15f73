// A tensor (..., C) seen as N rows of C elements: what ops along the last dimension want, of any number of
// dimensions, so that Python need not reshape (a microsecond a tensor).
#pragma once

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

}  // namespace gptcore
