#include "kernels/rms_norm/rms_norm.h"

#include "bindings/tensor_caster.h"

namespace py = pybind11;

void register_rms_norm(py::module_& m) {
  m.def("rms_norm_forward", &gptcore::rms_norm_forward, py::arg("x"), py::arg("residual"), py::arg("weight"),
        py::arg("eps"), py::arg("weight_offset"), py::arg("y"), py::arg("h"), py::arg("rstd"),
        py::call_guard<py::gil_scoped_release_simple>(),
        "y = rms_norm(x + residual); writes h and rstd where given.");
  m.def("rms_norm_backward", &gptcore::rms_norm_backward, py::arg("grad_y"), py::arg("grad_h"), py::arg("h"),
        py::arg("weight"), py::arg("weight_offset"), py::arg("rstd"), py::arg("dx"), py::arg("dweight"),
        py::call_guard<py::gil_scoped_release_simple>(), "Gradients of rms_norm_forward, overwritten.");
}
