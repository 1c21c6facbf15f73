#include "kernels/rotary/rotary.h"

#include "bindings/tensor_caster.h"

namespace py = pybind11;

void register_rotary(py::module_& m) {
  m.def("rotary", &gptcore::rotary, py::arg("x"), py::arg("cos"), py::arg("sin"), py::arg("positions"),
        py::arg("offset"), py::arg("interleaved"), py::arg("inverse"), py::arg("out"),
        py::call_guard<py::gil_scoped_release_simple>(),
        "Turns the first R elements of each head by the angles of its position; inverse turns back.");
}
