#include "kernels/grad_norm/grad_norm.h"

#include "cases.h"

namespace gptcore::cases {
namespace {

const ForBothTypes grad_norm_cases("grad_norm", [](DType dtype) -> Outputs {
  const std::vector<Tensor> grads = uniform_list(dtype, 1);
  const Tensor norm(DType::f64, {1});
  *norm.view().as<double>() = grad_norm(views(grads), 2.0, "grad_norm").first;
  const Tensor sums(DType::f64, {square_blocks(views(grads), 1024)});
  square_sums(views(grads), 1024, 2.0, sums);
  return {norm, sums};
});

}  // namespace
}  // namespace gptcore::cases
