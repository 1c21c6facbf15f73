#include "kernels/gated_activation/gated_activation.h"

#include "bindings/tensor_caster.h"

namespace py = pybind11;

void register_gated_activation(py::module_& m) {
  m.def("gated_activation_forward", &gptcore::gated_activation_forward, py::arg("kind"), py::arg("gate"),
        py::arg("up"), py::arg("gate_bias"), py::arg("up_bias"), py::arg("y"),
        py::call_guard<py::gil_scoped_release>(),
        "y = act(gate + gate_bias) [* (up + up_bias)]; kind: 0 gelu_tanh, 1 gelu_erf, 2 silu, 3 relu, "
        "+4 gated with gate and up packed in one tensor.");
  m.def("gated_activation_backward", &gptcore::gated_activation_backward, py::arg("kind"), py::arg("grad_y"),
        py::arg("gate"), py::arg("up"), py::arg("gate_bias"), py::arg("up_bias"), py::arg("dgate"),
        py::arg("dup"), py::arg("dgate_bias"), py::arg("dup_bias"), py::call_guard<py::gil_scoped_release>(),
        "Gradients of gated_activation_forward, overwritten.");
}
