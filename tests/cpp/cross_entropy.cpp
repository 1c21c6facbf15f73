#include "kernels/cross_entropy/cross_entropy.h"

#include "cases.h"

namespace gptcore::cases {
namespace {

const ForBothTypes cross_entropy_cases("cross_entropy", [](DType dtype) -> Outputs {
  const int64_t rows = 100, classes = 1003;
  const Tensor logits = uniform(dtype, {rows, classes}, 1), targets = indices(DType::i64, {rows}, 1003, 2),
               class_weight = uniform(DType::f32, {classes}, 3), grad = uniform(DType::f32, {1}, 4);
  targets.view().as<int64_t>()[7] = -100;
  const Tensor loss(DType::f32, {1}), lse(DType::f32, {rows}), dlogits(dtype, {rows, classes});
  cross_entropy_forward(logits, targets, class_weight, -100, 0.1, "mean", loss, lse);
  cross_entropy_backward(grad, logits, targets, class_weight, lse, -100, 0.1, "mean", dlogits);
  return {loss, lse, dlogits};
});

}  // namespace
}  // namespace gptcore::cases
