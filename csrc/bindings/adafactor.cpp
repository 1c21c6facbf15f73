#include "kernels/adafactor/adafactor.h"

#include <pybind11/stl.h>

#include "bindings/tensor_caster.h"

namespace py = pybind11;
using gptcore::TensorList;

namespace {

std::pair<double, bool> adafactor(const TensorList& params, const TensorList& grads,
                                  const TensorList& row_vars, const TensorList& col_vars,
                                  const TensorList& variances, const TensorList& exp_avgs,
                                  const TensorList& copies, const std::vector<double>& weight_decay,
                                  double step_size, double beta2, double beta1, double eps1, double eps2,
                                  bool eps_added, std::optional<double> clip_threshold, bool scale_parameter,
                                  bool scaled_decay, bool maximize, std::optional<double> max_norm,
                                  double grad_scale, std::optional<double> grad_norm) {
  return gptcore::adafactor({params.views, grads.views, row_vars.views, col_vars.views, variances.views,
                             exp_avgs.views, copies.views},
                            weight_decay,
                            {step_size, beta2, beta1, eps1, eps2, eps_added, clip_threshold, scale_parameter,
                             scaled_decay, maximize, max_norm, grad_scale, grad_norm});
}

}  // namespace

void register_adafactor(py::module_& m) {
  m.def("adafactor", &adafactor, py::arg("params"), py::arg("grads"), py::arg("row_vars"),
        py::arg("col_vars"), py::arg("variances"), py::arg("exp_avgs"), py::arg("copies"),
        py::arg("weight_decay"), py::arg("step_size"), py::arg("beta2"), py::arg("beta1"), py::arg("eps1"),
        py::arg("eps2"), py::arg("eps_added"), py::arg("clip_threshold"), py::arg("scale_parameter"),
        py::arg("scaled_decay"), py::arg("maximize"), py::arg("max_norm"), py::arg("grad_scale"),
        py::arg("grad_norm"), py::call_guard<py::gil_scoped_release_simple>(),
        "One Adafactor step over lists of tensors; returns (norm, found_inf).");
}
