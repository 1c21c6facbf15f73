#include "kernels/adafactor/adafactor.h"

#include "cases.h"
#include "kernels/adafactor/adafactor_blocks.h"

namespace gptcore::cases {
namespace {

// A factored matrix and an unfactored vector, with every option that adds work.
const ForBothTypes adafactor_cases("adafactor", [](DType dtype) -> Outputs {
  const std::vector<int64_t> matrix{500, 300}, vector{70001};
  const Tensor row_var(DType::f32, {500, 1}), col_var(DType::f32, {1, 300}), variance(DType::f32, vector);
  const std::vector<Tensor> params{uniform(DType::f32, matrix, 1), uniform(DType::f32, vector, 2)},
      grads{uniform(dtype, matrix, 3), uniform(dtype, vector, 4)},
      averages{uniform(DType::f32, matrix, 5), uniform(DType::f32, vector, 6)},
      copies{Tensor(DType::bf16, matrix), Tensor(DType::bf16, vector)};
  const std::vector<TensorView> p = views(params), g = views(grads), m = views(averages), c = views(copies),
                                rows{row_var, {}}, columns{col_var, {}}, variances{{}, variance};
  AdafactorOptions options;
  options.beta2 = 0.9, options.beta1 = 0.9, options.clip_threshold = 1.0, options.max_norm = 1.0;
  adafactor({.params = p,
             .grads = g,
             .row_vars = rows,
             .col_vars = columns,
             .variances = variances,
             .exp_avgs = m,
             .copies = c},
            {0.1, 0.0}, options);
  Outputs outputs{row_var, col_var, variance};
  for (const std::vector<Tensor>* list : {&params, &averages, &copies}) {
    outputs.insert(outputs.end(), list->begin(), list->end());
  }
  return outputs;
});

// The same in phases, by one owner of both; torch's floor, so that the second phase sums by elements.
const ForBothTypes adafactor_blocks_cases("adafactor_blocks", [](DType dtype) -> Outputs {
  const std::vector<int64_t> matrix{500, 256}, vector{70001};
  const Tensor row_var(DType::f32, {500, 1}), col_var(DType::f32, {1, 256}), variance(DType::f32, vector);
  const std::vector<Tensor> params{uniform(DType::f32, matrix, 1), uniform(DType::f32, vector, 2)},
      grads{uniform(dtype, matrix, 3), uniform(dtype, vector, 4)},
      statistics{Tensor(DType::f64, {16, 515}), Tensor(DType::f64, {69, 2})},
      totals{Tensor(DType::f64, {3}), Tensor(DType::f64, {2})},
      sums{Tensor(DType::f64, {16, 1}), Tensor(DType::f64, {69, 1})};
  const std::vector<TensorView> p = views(params), g = views(grads), s = views(statistics), t = views(totals),
                                u = views(sums), rows{row_var, {}}, columns{col_var, {}},
                                variances{{}, variance}, none;
  const std::vector<AdafactorSlice> slices{{128'000, 500, 256, 32, 0}, {70'001, 0, 0, 0, 0}};
  const std::vector<double> decay{0.1, 0.0};
  AdafactorOptions options;
  options.beta2 = 0.9, options.clip_threshold = 1.0, options.grad_norm = 1.0;
  options.eps_added = false, options.eps1 = 1.0;
  const AdafactorSlices call = {{p, g, rows, columns, variances, none, none}, slices, decay};
  adafactor_statistics(call, options, s);
  adafactor_updates(call, options, s, t, u);
  adafactor_apply(call, options, t, u);
  Outputs outputs{row_var, col_var, variance};
  for (const std::vector<Tensor>* list : {&params, &statistics, &totals, &sums}) {
    outputs.insert(outputs.end(), list->begin(), list->end());
  }
  return outputs;
});

}  // namespace
}  // namespace gptcore::cases
