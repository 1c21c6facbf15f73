#include "kernels/linear_cross_entropy/linear_cross_entropy.h"

#include "cases.h"

namespace gptcore::cases {
namespace {

constexpr int64_t kRows = 150, kWidth = 72, kWords = 3001;

struct Inputs {
  Tensor x, weight, targets, bias, token_weight;
  LinearCrossEntropyOptions options{};

  explicit Inputs(DType dtype)
      : x(uniform(dtype, {kRows, kWidth}, 1)),
        weight(uniform(dtype, {kWords, kWidth}, 2)),
        targets(indices(DType::i64, {kRows}, kWords, 3)),
        bias(uniform(DType::f32, {kWords}, 4)),
        token_weight(uniform(DType::f32, {kRows}, 5)) {
    targets.view().as<int64_t>()[11] = -100;
    options.ignore_index = -100;
    options.label_smoothing = 0.1, options.z_loss = 1e-4, options.logit_scale = 1.5;
    options.logit_soft_cap = 4.0, options.reduction = "sum";
    options.bias = bias, options.token_weight = token_weight;
  }
};

struct Results {
  Tensor loss{DType::f32, {1}}, z{DType::f32, {1}}, logprobs{DType::f32, {kRows}}, lse{DType::f32, {kRows}};
  Tensor dx, dweight, dbias{DType::f32, {kWords}};

  Results(DType dtype, DType weight_dtype)
      : dx(dtype, {kRows, kWidth}), dweight(weight_dtype, {kWords, kWidth}) {}
  LinearCrossEntropyOutputs outputs() const {
    LinearCrossEntropyOutputs outputs{};
    outputs.loss = loss, outputs.z = z, outputs.logprobs = logprobs, outputs.lse = lse;
    return outputs;
  }
  LinearCrossEntropyGradients gradients() const { return {dx, dweight, dbias}; }
  Outputs all() const { return {loss, z, logprobs, lse, dx, dweight, dbias}; }
};

Outputs in_turn(DType dtype) {
  const Inputs in(dtype);
  const Results results(dtype, DType::f32);
  const Tensor grad = uniform(DType::f32, {1}, 6);
  linear_cross_entropy_forward(in.x, in.weight, in.targets, in.options, results.outputs(), {});
  linear_cross_entropy_backward(grad, grad, in.x, in.weight, in.targets, results.lse, in.options,
                                results.gradients(), true);
  return results.all();
}

Outputs at_once(DType dtype) {
  const Inputs in(dtype);
  const Results results(dtype, dtype);
  linear_cross_entropy_forward(in.x, in.weight, in.targets, in.options, results.outputs(),
                               results.gradients());
  return results.all();
}

const ForBothTypes in_turn_cases("linear_cross_entropy in turn", in_turn);
const ForBothTypes at_once_cases("linear_cross_entropy at once", at_once);

}  // namespace
}  // namespace gptcore::cases
