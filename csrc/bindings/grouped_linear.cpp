#include "kernels/grouped_linear/grouped_linear.h"

#include "bindings/tensor_caster.h"

namespace py = pybind11;

void register_grouped_linear(py::module_& m) {
  m.def("grouped_linear", &gptcore::grouped_linear, py::arg("x"), py::arg("weight"), py::arg("offsets"),
        py::arg("bias"), py::arg("out"), py::arg("largest") = gptcore::kAnyGroup,
        py::call_guard<py::gil_scoped_release_simple>(), "Each expert's linear layer over its rows.");
  m.def("grouped_linear_backward", &gptcore::grouped_linear_backward, py::arg("dy"), py::arg("x"),
        py::arg("weight"), py::arg("offsets"), py::arg("dx"), py::arg("dweight"), py::arg("dbias"),
        py::arg("accumulate"), py::arg("largest_dx") = gptcore::kAnyGroup,
        py::arg("largest_dweight") = gptcore::kAnyGroup, py::call_guard<py::gil_scoped_release_simple>(),
        "Gradients of grouped_linear.");
}
