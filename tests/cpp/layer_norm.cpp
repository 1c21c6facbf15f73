#include "kernels/layer_norm/layer_norm.h"

#include "cases.h"

namespace gptcore::cases {
namespace {

const ForBothTypes layer_norm_cases("layer_norm", [](DType dtype) -> Outputs {
  const std::vector<int64_t> sizes{700, 130}, width{130};
  const Tensor x = uniform(dtype, sizes, 1), residual = uniform(dtype, sizes, 2),
               dy = uniform(dtype, sizes, 3), dh = uniform(dtype, sizes, 4),
               weight = uniform(dtype, width, 5), bias = uniform(dtype, width, 6);
  const Tensor y(dtype, sizes), h(dtype, sizes), stats(DType::f32, {2, 700}), dx(dtype, sizes),
      dweight(DType::f32, width), dbias(DType::f32, width);
  layer_norm_forward(x, residual, weight, bias, 1e-5f, 1.0f, y, h, stats);
  layer_norm_backward(dy, dh, h, weight, 1.0f, stats, dx, dweight, dbias);
  return {y, h, stats, dx, dweight, dbias};
});

}  // namespace
}  // namespace gptcore::cases
