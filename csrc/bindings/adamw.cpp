#include "kernels/adamw/adamw.h"

#include <pybind11/stl.h>

#include "bindings/tensor_caster.h"

namespace py = pybind11;
using gptcore::TensorList;

namespace {

std::pair<double, bool> adamw(const TensorList& params, const TensorList& grads, const TensorList& exp_avgs,
                              const TensorList& exp_avg_sqs, const TensorList& copies,
                              const std::vector<double>& weight_decay, int64_t step, double lr, double beta1,
                              double beta2, double eps, std::optional<double> max_norm, double grad_scale) {
  return gptcore::adamw(params.views, grads.views, exp_avgs.views, exp_avg_sqs.views, copies.views,
                        weight_decay, {step, lr, beta1, beta2, eps, max_norm, grad_scale});
}

}  // namespace

void register_adamw(py::module_& m) {
  m.def("adamw", &adamw, py::arg("params"), py::arg("grads"), py::arg("exp_avgs"), py::arg("exp_avg_sqs"),
        py::arg("copies"), py::arg("weight_decay"), py::arg("step"), py::arg("lr"), py::arg("beta1"),
        py::arg("beta2"), py::arg("eps"), py::arg("max_norm"), py::arg("grad_scale"),
        py::call_guard<py::gil_scoped_release_simple>(),
        "One AdamW step over lists of tensors; returns (norm, found_inf).");
}
