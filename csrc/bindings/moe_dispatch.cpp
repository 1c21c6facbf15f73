#include "kernels/moe_dispatch/moe_dispatch.h"

#include "bindings/tensor_caster.h"

namespace py = pybind11;

void register_moe_dispatch(py::module_& m) {
  m.def("moe_dispatch_forward", &gptcore::moe_dispatch_forward, py::arg("x"), py::arg("rows"),
        py::arg("offsets"), py::arg("out"), py::call_guard<py::gil_scoped_release_simple>(),
        "out[rows[n, k]] = x[n].");
  m.def("moe_combine_forward", &gptcore::moe_combine_forward, py::arg("y"), py::arg("rows"), py::arg("gates"),
        py::arg("offsets"), py::arg("out"), py::call_guard<py::gil_scoped_release_simple>(),
        "out[n] = the sum of gates[n, k] y[rows[n, k]].");
  m.def("moe_combine_backward", &gptcore::moe_combine_backward, py::arg("dout"), py::arg("y"),
        py::arg("rows"), py::arg("gates"), py::arg("offsets"), py::arg("dy"), py::arg("dgates"),
        py::call_guard<py::gil_scoped_release_simple>(), "Gradients of moe_combine_forward, overwritten.");
}
