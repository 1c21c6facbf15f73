#include "kernels/sgd/sgd.h"

#include <pybind11/stl.h>

#include "bindings/tensor_caster.h"
#include "kernels/grad_norm/grad_norm.h"

namespace py = pybind11;
using gptcore::TensorList;

namespace {

// The norm, where it is wanted, and the update in one crossing. With grad_norm given, the gradients are known
// to be finite.
std::pair<std::optional<double>, bool> sgd(const TensorList& params, const TensorList& grads,
                                           const TensorList& momentum_buffers, const TensorList& copies,
                                           const std::vector<double>& weight_decay,
                                           const std::vector<bool>& first, double lr, double momentum,
                                           double dampening, bool nesterov, bool maximize,
                                           std::optional<double> max_norm, double grad_scale,
                                           std::optional<double> grad_norm, bool check_finite) {
  if (!grad_norm && (check_finite || max_norm)) {
    const auto [norm, found_inf] = gptcore::grad_norm(grads.views, grad_scale, "sgd_");
    if (found_inf) return {norm, true};
    grad_norm = norm;
  }
  gptcore::sgd({params.views, grads.views, momentum_buffers.views, copies.views, weight_decay, first},
               {lr, momentum, dampening, nesterov, maximize, max_norm, grad_scale}, grad_norm.value_or(0.0));
  return {grad_norm, false};
}

}  // namespace

void register_sgd(py::module_& m) {
  m.def("sgd", &sgd, py::arg("params"), py::arg("grads"), py::arg("momentum_buffers"), py::arg("copies"),
        py::arg("weight_decay"), py::arg("first"), py::arg("lr"), py::arg("momentum"), py::arg("dampening"),
        py::arg("nesterov"), py::arg("maximize"), py::arg("max_norm"), py::arg("grad_scale"),
        py::arg("grad_norm"), py::arg("check_finite"), py::call_guard<py::gil_scoped_release_simple>(),
        "One SGD step over lists of tensors; returns (norm or None, found_inf).");
}
