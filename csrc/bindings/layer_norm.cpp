#include "kernels/layer_norm/layer_norm.h"

#include "bindings/tensor_caster.h"

namespace py = pybind11;

void register_layer_norm(py::module_& m) {
  m.def("layer_norm_forward", &gptcore::layer_norm_forward, py::arg("x"), py::arg("residual"),
        py::arg("weight"), py::arg("bias"), py::arg("eps"), py::arg("y"), py::arg("h"), py::arg("stats"),
        py::call_guard<py::gil_scoped_release>(),
        "y = layer_norm(x + residual) over (N, C); writes h and stats where given.");
  m.def("layer_norm_backward", &gptcore::layer_norm_backward, py::arg("grad_y"), py::arg("grad_h"),
        py::arg("h"), py::arg("weight"), py::arg("stats"), py::arg("dx"), py::arg("dweight"),
        py::arg("dbias"), py::call_guard<py::gil_scoped_release>(),
        "Gradients of layer_norm_forward, overwritten.");
}
