#include "kernels/adamw/adamw.h"

#include <pybind11/stl.h>

#include "bindings/tensor_caster.h"
#include "kernels/grad_norm/grad_norm.h"

namespace py = pybind11;
using gptcore::TensorList;

namespace {

// The norm and the update in one crossing. With grad_norm given, the gradients are known to be finite.
std::pair<double, bool> adamw(const TensorList& params, const TensorList& lows, const TensorList& grads,
                              const TensorList& exp_avgs, const TensorList& exp_avg_sqs,
                              const TensorList& max_exp_avg_sqs, const TensorList& copies,
                              const TensorList& steps, const std::vector<double>& weight_decay, int64_t step,
                              double lr, double beta1, double beta2, double eps, bool decoupled,
                              bool maximize, std::optional<double> max_norm, double grad_scale,
                              std::optional<double> grad_norm) {
  if (!grad_norm) {
    const auto [norm, found_inf] = gptcore::grad_norm(grads.views, grad_scale, "adamw_");
    if (found_inf) return {norm, true};
    grad_norm = norm;
  }
  gptcore::adamw({params.views, lows.views, grads.views, exp_avgs.views, exp_avg_sqs.views,
                  max_exp_avg_sqs.views, copies.views, steps.views, weight_decay},
                 {step, lr, beta1, beta2, eps, decoupled, maximize, max_norm, grad_scale}, *grad_norm);
  return {*grad_norm, false};
}

}  // namespace

void register_adamw(py::module_& m) {
  m.def("adamw", &adamw, py::arg("params"), py::arg("lows"), py::arg("grads"), py::arg("exp_avgs"),
        py::arg("exp_avg_sqs"), py::arg("max_exp_avg_sqs"), py::arg("copies"), py::arg("steps"),
        py::arg("weight_decay"), py::arg("step"), py::arg("lr"), py::arg("beta1"), py::arg("beta2"),
        py::arg("eps"), py::arg("decoupled"), py::arg("maximize"), py::arg("max_norm"), py::arg("grad_scale"),
        py::arg("grad_norm"), py::call_guard<py::gil_scoped_release_simple>(),
        "One Adam step over lists of tensors; returns (norm, found_inf).");
}
