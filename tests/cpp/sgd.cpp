#include "kernels/sgd/sgd.h"

#include "cases.h"

namespace gptcore::cases {
namespace {

const ForBothTypes sgd_cases("sgd", [](DType dtype) -> Outputs {
  const std::vector<Tensor> params = uniform_list(DType::f32, 1), grads = uniform_list(dtype, 4),
                            buffers = uniform_list(DType::f32, 7), copies = uniform_list(DType::bf16, 10);
  const std::vector<TensorView> p = views(params), g = views(grads), b = views(buffers), c = views(copies);
  const std::vector<double> decay{0.1, 0.0, 0.1};
  const std::vector<bool> first{false, true, false};
  SgdOptions options;
  options.momentum = 0.9, options.nesterov = true, options.max_norm = 1.0;
  sgd({.params = p, .grads = g, .momentum_buffers = b, .copies = c, .weight_decay = decay, .first = first},
      options, 2.5);
  Outputs outputs;
  for (const std::vector<Tensor>* list : {&params, &buffers, &copies}) {
    outputs.insert(outputs.end(), list->begin(), list->end());
  }
  return outputs;
});

}  // namespace
}  // namespace gptcore::cases
