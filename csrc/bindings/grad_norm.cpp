#include "kernels/grad_norm/grad_norm.h"

#include <pybind11/stl.h>

#include "bindings/tensor_caster.h"

namespace py = pybind11;

using gptcore::StepNumber;
using gptcore::TensorList;
using gptcore::TensorView;

void register_grad_norm(py::module_& m) {
  m.def(
      "grad_norm",
      [](const TensorList& grads, const StepNumber& grad_scale, const TensorView& norm,
         const TensorView& found_inf) {
        return gptcore::grad_norm(grads.views, grad_scale, "grad_norm", {norm, found_inf});
      },
      py::arg("grads"), py::arg("grad_scale"), py::arg("norm"), py::arg("found_inf"),
      py::call_guard<py::gil_scoped_release_simple>(),
      "Euclidean norm of all tensors together; returns (norm, found_inf).");
  m.def(
      "square_sums",
      [](const TensorList& grads, int64_t block, const StepNumber& grad_scale, const TensorView& sums,
         const TensorView& found_inf) {
        return gptcore::square_sums(grads.views, block, grad_scale, sums, found_inf);
      },
      py::arg("grads"), py::arg("block"), py::arg("grad_scale"), py::arg("out"), py::arg("found_inf"),
      py::call_guard<py::gil_scoped_release_simple>(), "Sums of squares of blocks; returns found_inf.");
  m.def(
      "square_blocks",
      [](const TensorList& grads, int64_t block) { return gptcore::square_blocks(grads.views, block); },
      py::arg("grads"), py::arg("block"), "How many sums square_sums writes.");
}
