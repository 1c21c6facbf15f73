#include "kernels/adamw/adamw.h"

#include "cases.h"

namespace gptcore::cases {
namespace {

Outputs stepped(DType dtype) {
  const std::vector<Tensor> params = uniform_list(DType::f32, 1), grads = uniform_list(dtype, 4),
                            averages = uniform_list(DType::f32, 7), copies = uniform_list(DType::bf16, 10),
                            squares(uniform_list(DType::f32, 13)), largest(uniform_list(DType::f32, 16));
  for (const std::vector<Tensor>* list : {&squares, &largest}) {
    for (const TensorView& view : views(*list)) {
      for (int64_t i = 0; i < view.numel(); ++i) view.as<float>()[i] *= view.as<float>()[i];
    }
  }
  const std::vector<TensorView> p = views(params), g = views(grads), m = views(averages), v = views(squares),
                                w = views(largest), c = views(copies);
  AdamwOptions options;
  options.step = 3, options.max_norm = 1.0;
  const std::vector<TensorView> none;
  const std::vector<double> decay{0.1, 0.0, 0.1};
  adamw({.params = p,
         .lows = none,
         .grads = g,
         .exp_avgs = m,
         .exp_avg_sqs = v,
         .max_exp_avg_sqs = w,
         .copies = c,
         .steps = none,
         .weight_decay = decay},
        options, 2.5);
  Outputs outputs;
  for (const std::vector<Tensor>* list : {&params, &averages, &squares, &largest, &copies}) {
    outputs.insert(outputs.end(), list->begin(), list->end());
  }
  return outputs;
}

const ForBothTypes adamw_cases("adamw", stepped);

}  // namespace
}  // namespace gptcore::cases
