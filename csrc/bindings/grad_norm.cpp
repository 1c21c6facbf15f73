#include "kernels/grad_norm/grad_norm.h"

#include <pybind11/stl.h>

#include "bindings/tensor_caster.h"

namespace py = pybind11;

void register_grad_norm(py::module_& m) {
  m.def(
      "grad_norm",
      [](const gptcore::TensorList& grads, double grad_scale) {
        return gptcore::grad_norm(grads.views, grad_scale, "grad_norm");
      },
      py::arg("grads"), py::arg("grad_scale"), py::call_guard<py::gil_scoped_release_simple>(),
      "Euclidean norm of all tensors together; returns (norm, found_inf).");
}
