#include "kernels/grouped_linear/grouped_linear.h"

#include "cases.h"

namespace gptcore::cases {
namespace {

// An empty group, one of a few rows, one of several blocks, and rows of none.
Tensor offsets() {
  Tensor tensor(DType::i32, {5});
  const int32_t values[5] = {0, 7, 7, 40, 560};
  for (int i = 0; i < 5; ++i) tensor.view().as<int32_t>()[i] = values[i];
  return tensor;
}

Outputs forward(DType dtype) {
  const Tensor x = uniform(dtype, {570, 150}, 1), weight = uniform(dtype, {4, 220, 150}, 2);
  const Tensor out(dtype, {570, 220});
  grouped_linear(x, weight, offsets(), uniform(dtype, {4, 220}, 3), out);
  return {out};
}

Outputs backward(DType dtype) {
  const Tensor x = uniform(dtype, {570, 150}, 1), weight = uniform(dtype, {4, 220, 150}, 2);
  const Tensor dy = uniform(dtype, {570, 220}, 3), dx(dtype, {570, 150}), dbias(dtype, {4, 220});
  const Tensor dweight = uniform(DType::f32, {4, 220, 150}, 4);
  grouped_linear_backward(dy, x, weight, offsets(), dx, dweight, dbias, true);
  return {dx, dweight, dbias};
}

const ForBothTypes forward_cases("grouped_linear", forward);
const ForBothTypes backward_cases("grouped_linear backward", backward);

}  // namespace
}  // namespace gptcore::cases
