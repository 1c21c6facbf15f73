#include "kernels/gated_activation/gated_activation.h"

#include "cases.h"

namespace gptcore::cases {
namespace {

Outputs plain(DType dtype) {
  const std::vector<int64_t> sizes{400, 330}, width{330};
  const Tensor x = uniform(dtype, sizes, 1), bias = uniform(dtype, width, 2), dy = uniform(dtype, sizes, 3);
  const Tensor y(dtype, sizes), dx(dtype, sizes), dbias(DType::f32, width);
  gated_activation_forward(kGeluErf, x, {}, bias, {}, y);
  gated_activation_backward(kGeluErf, dy, x, {}, bias, {}, dx, {}, dbias, {});
  return {y, dx, dbias};
}

Outputs gated(DType dtype) {
  const std::vector<int64_t> sizes{400, 330}, width{330};
  const Tensor gate = uniform(dtype, sizes, 1), up = uniform(dtype, sizes, 2), dy = uniform(dtype, sizes, 3),
               gate_bias = uniform(dtype, width, 4), up_bias = uniform(dtype, width, 5);
  const Tensor y(dtype, sizes), dgate(dtype, sizes), dup(dtype, sizes), dgate_bias(DType::f32, width),
      dup_bias(DType::f32, width);
  gated_activation_forward(kGeluTanh, gate, up, gate_bias, up_bias, y);
  gated_activation_backward(kGeluTanh, dy, gate, up, gate_bias, up_bias, dgate, dup, dgate_bias, dup_bias);
  return {y, dgate, dup, dgate_bias, dup_bias};
}

Outputs packed(DType dtype) {
  const Tensor both = uniform(dtype, {400, 660}, 1), dy = uniform(dtype, {400, 330}, 2);
  const Tensor y(dtype, {400, 330}), dboth(dtype, {400, 660});
  gated_activation_forward(kSilu + kPacked, both, {}, {}, {}, y);
  gated_activation_backward(kSilu + kPacked, dy, both, {}, {}, {}, dboth, {}, {}, {});
  return {y, dboth};
}

const ForBothTypes plain_cases("gated_activation plain", plain);
const ForBothTypes gated_cases("gated_activation gated", gated);
const ForBothTypes packed_cases("gated_activation packed", packed);

}  // namespace
}  // namespace gptcore::cases
