#include "kernels/adafactor/adafactor.h"

#include <pybind11/stl.h>

#include "bindings/tensor_caster.h"
#include "kernels/adafactor/adafactor_blocks.h"

namespace py = pybind11;
using gptcore::StepNumber;
using gptcore::TensorList;
using gptcore::TensorView;

namespace {

std::pair<double, bool> adafactor(
    const TensorList& params, const TensorList& grads, const TensorList& row_vars, const TensorList& col_vars,
    const TensorList& variances, const TensorList& exp_avgs, const TensorList& copies,
    const std::vector<double>& weight_decay, const StepNumber& step_size, const StepNumber& beta2,
    double beta1, double eps1, double eps2, bool eps_added, std::optional<double> clip_threshold,
    bool scale_parameter, bool scaled_decay, bool maximize, std::optional<double> max_norm,
    const StepNumber& grad_scale, const std::optional<StepNumber>& grad_norm, const StepNumber& decay_factor,
    const TensorList& steps, const TensorView& norm, const TensorView& found_inf) {
  return gptcore::adafactor(
      {params.views, grads.views, row_vars.views, col_vars.views, variances.views, exp_avgs.views,
       copies.views},
      weight_decay,
      {0.0, 0.0, beta1, eps1, eps2, eps_added, clip_threshold, scale_parameter, scaled_decay, maximize,
       max_norm, 1.0, std::nullopt},
      {step_size, beta2, decay_factor, grad_scale, grad_norm, steps.views, {norm, found_inf}});
}

// A slice of a whole as (numel, rows, cols, block, start).
using SliceNumbers = std::array<int64_t, 5>;

// One phase, from 1; each takes its own of the last three lists.
void adafactor_blocks(int phase, const TensorList& params, const TensorList& grads,
                      const TensorList& row_vars, const TensorList& col_vars, const TensorList& variances,
                      const TensorList& exp_avgs, const TensorList& copies,
                      const std::vector<SliceNumbers>& slices, const std::vector<double>& weight_decay,
                      const StepNumber& step_size, const StepNumber& beta2, double beta1, double eps1,
                      double eps2, bool eps_added, std::optional<double> clip_threshold, bool scale_parameter,
                      bool scaled_decay, bool maximize, std::optional<double> max_norm,
                      const StepNumber& grad_scale, const std::optional<StepNumber>& grad_norm,
                      const StepNumber& decay_factor, const TensorList& statistics, const TensorList& totals,
                      const TensorList& sums) {
  std::vector<gptcore::AdafactorSlice> places;
  for (const SliceNumbers& s : slices) places.push_back({s[0], s[1], s[2], s[3], s[4]});
  const gptcore::AdafactorSlices call = {
      {params.views, grads.views, row_vars.views, col_vars.views, variances.views, exp_avgs.views,
       copies.views},
      places,
      weight_decay,
      gptcore::AdafactorGiven{step_size, beta2, decay_factor, grad_scale, grad_norm, {}, {}}};
  const gptcore::AdafactorOptions options = {
      0.0,          0.0,      beta1,    eps1, eps2,        eps_added, clip_threshold, scale_parameter,
      scaled_decay, maximize, max_norm, 1.0,  std::nullopt};
  if (phase == 1) gptcore::adafactor_statistics(call, options, statistics.views);
  if (phase == 2) gptcore::adafactor_updates(call, options, statistics.views, totals.views, sums.views);
  if (phase == 3) gptcore::adafactor_apply(call, options, totals.views, sums.views);
}

}  // namespace

void register_adafactor(py::module_& m) {
  m.def("adafactor", &adafactor, py::arg("params"), py::arg("grads"), py::arg("row_vars"),
        py::arg("col_vars"), py::arg("variances"), py::arg("exp_avgs"), py::arg("copies"),
        py::arg("weight_decay"), py::arg("step_size"), py::arg("beta2"), py::arg("beta1"), py::arg("eps1"),
        py::arg("eps2"), py::arg("eps_added"), py::arg("clip_threshold"), py::arg("scale_parameter"),
        py::arg("scaled_decay"), py::arg("maximize"), py::arg("max_norm"), py::arg("grad_scale"),
        py::arg("grad_norm"), py::arg("decay_factor"), py::arg("steps"), py::arg("norm"),
        py::arg("found_inf"), py::call_guard<py::gil_scoped_release_simple>(),
        "One Adafactor step over lists of tensors; returns (norm, found_inf).");
  m.def("adafactor_blocks", &adafactor_blocks, py::arg("phase"), py::arg("params"), py::arg("grads"),
        py::arg("row_vars"), py::arg("col_vars"), py::arg("variances"), py::arg("exp_avgs"),
        py::arg("copies"), py::arg("slices"), py::arg("weight_decay"), py::arg("step_size"), py::arg("beta2"),
        py::arg("beta1"), py::arg("eps1"), py::arg("eps2"), py::arg("eps_added"), py::arg("clip_threshold"),
        py::arg("scale_parameter"), py::arg("scaled_decay"), py::arg("maximize"), py::arg("max_norm"),
        py::arg("grad_scale"), py::arg("grad_norm"), py::arg("decay_factor"), py::arg("statistics"),
        py::arg("totals"), py::arg("sums"), py::call_guard<py::gil_scoped_release_simple>(),
        "One phase of an Adafactor step over slices of tensors.");
}
