#include "kernels/grad_norm/grad_norm.h"

#include <pybind11/stl.h>

#include "bindings/tensor_caster.h"

namespace py = pybind11;

using gptcore::TensorList;
using gptcore::TensorView;

void register_grad_norm(py::module_& m) {
  m.def(
      "grad_norm",
      [](const TensorList& grads, double grad_scale) {
        return gptcore::grad_norm(grads.views, grad_scale, "grad_norm");
      },
      py::arg("grads"), py::arg("grad_scale"), py::call_guard<py::gil_scoped_release_simple>(),
      "Euclidean norm of all tensors together; returns (norm, found_inf).");
  m.def(
      "square_sums",
      [](const TensorList& grads, int64_t block, double grad_scale, const TensorView& sums) {
        return gptcore::square_sums(grads.views, block, grad_scale, sums);
      },
      py::arg("grads"), py::arg("block"), py::arg("grad_scale"), py::arg("out"),
      py::call_guard<py::gil_scoped_release_simple>(), "Sums of squares of blocks; returns found_inf.");
  m.def(
      "square_blocks",
      [](const TensorList& grads, int64_t block) { return gptcore::square_blocks(grads.views, block); },
      py::arg("grads"), py::arg("block"), "How many sums square_sums writes.");
}
