#include "kernels/sgd/sgd.h"

#include <pybind11/stl.h>

#include "bindings/tensor_caster.h"
#include "kernels/grad_norm/grad_norm.h"

namespace py = pybind11;
using gptcore::StepNumber;
using gptcore::TensorList;
using gptcore::TensorView;

namespace {

// The norm, where it is wanted, and the update in one crossing. With grad_norm given, the gradients are not looked
// through again.
std::pair<std::optional<double>, bool> sgd(const TensorList& params, const TensorList& grads,
                                           const TensorList& momentum_buffers, const TensorList& copies,
                                           const std::vector<double>& weight_decay,
                                           const std::vector<bool>& first, const StepNumber& lr,
                                           double momentum, double dampening, bool nesterov, bool maximize,
                                           std::optional<double> max_norm, const StepNumber& grad_scale,
                                           std::optional<StepNumber> grad_norm, bool check_finite,
                                           const TensorView& norm, const TensorView& found_inf) {
  const gptcore::StepResult result{norm, found_inf};
  if (!grad_norm && (check_finite || max_norm)) {
    const auto [total, found] = gptcore::grad_norm(grads.views, grad_scale, "sgd_", result);
    if (found) return {total, true};
    grad_norm = StepNumber{total, norm};
  }
  const auto [total, found] =
      gptcore::sgd({params.views, grads.views, momentum_buffers.views, copies.views, weight_decay, first},
                   {lr, momentum, dampening, nesterov, maximize, max_norm, grad_scale}, grad_norm, result);
  return {grad_norm ? std::optional(total) : std::nullopt, found};
}

}  // namespace

void register_sgd(py::module_& m) {
  m.def("sgd", &sgd, py::arg("params"), py::arg("grads"), py::arg("momentum_buffers"), py::arg("copies"),
        py::arg("weight_decay"), py::arg("first"), py::arg("lr"), py::arg("momentum"), py::arg("dampening"),
        py::arg("nesterov"), py::arg("maximize"), py::arg("max_norm"), py::arg("grad_scale"),
        py::arg("grad_norm"), py::arg("check_finite"), py::arg("norm"), py::arg("found_inf"),
        py::call_guard<py::gil_scoped_release_simple>(),
        "One SGD step over lists of tensors; returns (norm or None, found_inf).");
}
