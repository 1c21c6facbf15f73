#include "kernels/matmul/matmul.h"

#include "cases.h"

namespace gptcore::cases {
namespace {

// Few rows, as in decoding.
Outputs few_rows(DType dtype) {
  const Tensor a = uniform(dtype, {5, 600}, 1), b = uniform(dtype, {2000, 600}, 2);
  const Tensor out(dtype, {5, 2000});
  matmul(a, b, uniform(dtype, {2000}, 3), out, false, false, true);
  return {out};
}

// Few rows by a weight whose rows run across.
Outputs few_rows_across(DType dtype) {
  const Tensor a = uniform(dtype, {11, 300}, 1), b = uniform(dtype, {300, 1100}, 2);
  const Tensor out(dtype, {11, 1100});
  matmul(a, b, uniform(dtype, {1100}, 3), out, false, false, false);
  return {out};
}

Outputs packed_product(DType dtype) {
  const Tensor a = uniform(dtype, {300, 200}, 1), b = uniform(dtype, {200, 333}, 2);
  const Tensor out(dtype, {300, 333});
  matmul(a, b, uniform(dtype, {333}, 3), out, false, false, false);
  return {out};
}

// A bias's gradient.
Outputs one_row(DType dtype) {
  const Tensor a = uniform(dtype, {1, 1100}, 1), b = uniform(dtype, {1100, 333}, 2);
  const Tensor out(dtype, {1, 333});
  matmul(a, b, {}, out, false, false, false);
  return {out};
}

// A weight's gradient, added.
Outputs accumulated(DType dtype) {
  const Tensor a = uniform(dtype, {1100, 150}, 1), b = uniform(dtype, {1100, 220}, 2);
  const Tensor out = uniform(DType::f32, {150, 220}, 3);
  matmul(a, b, {}, out, true, true, false);
  return {out};
}

const ForBothTypes few_rows_cases("matmul few rows", few_rows);
const ForBothTypes few_rows_across_cases("matmul few rows across", few_rows_across);
const ForBothTypes one_row_cases("matmul one row", one_row);
const ForBothTypes packed_product_cases("matmul packed", packed_product);
const ForBothTypes accumulated_cases("matmul accumulated", accumulated);

}  // namespace
}  // namespace gptcore::cases
