#include "kernels/adamw/adamw.h"

#include <pybind11/stl.h>

#include "bindings/tensor_caster.h"
#include "kernels/grad_norm/grad_norm.h"

namespace py = pybind11;
using gptcore::StepNumber;
using gptcore::TensorList;
using gptcore::TensorView;

namespace {

// The norm and the update in one crossing. With grad_norm given, the gradients are not looked through again.
std::pair<double, bool> adamw(const TensorList& params, const TensorList& lows, const TensorList& grads,
                              const TensorList& exp_avgs, const TensorList& exp_avg_sqs,
                              const TensorList& max_exp_avg_sqs, const TensorList& copies,
                              const TensorList& steps, const std::vector<double>& weight_decay,
                              const std::optional<StepNumber>& step, const StepNumber& lr, double beta1,
                              double beta2, double eps, bool decoupled, bool maximize,
                              std::optional<double> max_norm, const StepNumber& grad_scale,
                              std::optional<StepNumber> grad_norm, const TensorView& norm,
                              const TensorView& found_inf) {
  const gptcore::StepResult result{norm, found_inf};
  if (!grad_norm) {
    const auto [total, found] = gptcore::grad_norm(grads.views, grad_scale, "adamw_", result);
    if (found) return {total, true};
    grad_norm = StepNumber{total, norm};
  }
  return gptcore::adamw({params.views, lows.views, grads.views, exp_avgs.views, exp_avg_sqs.views,
                         max_exp_avg_sqs.views, copies.views, steps.views, weight_decay},
                        {step, lr, beta1, beta2, eps, decoupled, maximize, max_norm, grad_scale}, *grad_norm,
                        result);
}

}  // namespace

void register_adamw(py::module_& m) {
  m.def("adamw", &adamw, py::arg("params"), py::arg("lows"), py::arg("grads"), py::arg("exp_avgs"),
        py::arg("exp_avg_sqs"), py::arg("max_exp_avg_sqs"), py::arg("copies"), py::arg("steps"),
        py::arg("weight_decay"), py::arg("step"), py::arg("lr"), py::arg("beta1"), py::arg("beta2"),
        py::arg("eps"), py::arg("decoupled"), py::arg("maximize"), py::arg("max_norm"), py::arg("grad_scale"),
        py::arg("grad_norm"), py::arg("norm"), py::arg("found_inf"),
        py::call_guard<py::gil_scoped_release_simple>(),
        "One Adam step over lists of tensors; returns (norm, found_inf).");
}
