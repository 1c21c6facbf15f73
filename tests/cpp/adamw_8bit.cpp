#include "kernels/adamw_8bit/adamw_8bit.h"

#include "cases.h"

namespace gptcore::cases {
namespace {

// Weights of the gradients' type, where bf16 ones are rounded at random.
const ForBothTypes adamw_8bit_cases("adamw_8bit", [](DType dtype) -> Outputs {
  const std::vector<Tensor> params = uniform_list(dtype, 1), grads = uniform_list(dtype, 4);
  std::vector<Tensor> averages, squares, average_scales, square_scales;
  for (const TensorView& p : views(params)) {
    const int64_t size = p.numel(), blocks = (size + 255) / 256;
    averages.push_back(Tensor(DType::u8, {size}));
    squares.push_back(Tensor(DType::u8, {size}));
    average_scales.push_back(Tensor(DType::f32, {blocks}));
    square_scales.push_back(Tensor(DType::f32, {blocks}));
  }
  const std::vector<TensorView> p = views(params), g = views(grads), m = views(averages), v = views(squares),
                                m_scales = views(average_scales), v_scales = views(square_scales), none;
  const std::vector<double> decay{0.1, 0.0, 0.1};
  const std::vector<std::pair<int64_t, int64_t>> places{{7, 0}, {7, 40'960}, {2, 256}};
  Adamw8bitOptions options;
  options.max_norm = 1.0, options.seed = 5;
  adamw_8bit({.params = p,
              .grads = g,
              .exp_avgs = m,
              .exp_avg_scales = m_scales,
              .exp_avg_sqs = v,
              .exp_avg_sq_scales = v_scales,
              .copies = none,
              .steps = none,
              .weight_decay = decay,
              .places = places},
             options, 2.5);
  Outputs outputs;
  for (const std::vector<Tensor>& list : {params, averages, squares, average_scales, square_scales}) {
    outputs.insert(outputs.end(), list.begin(), list.end());
  }
  return outputs;
});

}  // namespace
}  // namespace gptcore::cases
