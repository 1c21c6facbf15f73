#include "kernels/rms_norm/rms_norm.h"

#include "cases.h"

namespace gptcore::cases {
namespace {

const ForBothTypes rms_norm_cases("rms_norm", [](DType dtype) -> Outputs {
  const std::vector<int64_t> sizes{700, 130}, width{130};
  const Tensor x = uniform(dtype, sizes, 1), residual = uniform(dtype, sizes, 2),
               dy = uniform(dtype, sizes, 3), dh = uniform(dtype, sizes, 4),
               weight = uniform(dtype, width, 5);
  const Tensor y(dtype, sizes), h(dtype, sizes), rstd(DType::f32, {700}), dx(dtype, sizes),
      dweight(DType::f32, width);
  rms_norm_forward(x, residual, weight, 1e-6f, 1.0f, y, h, rstd);
  rms_norm_backward(dy, dh, h, weight, 1.0f, rstd, dx, dweight);
  return {y, h, rstd, dx, dweight};
});

}  // namespace
}  // namespace gptcore::cases
