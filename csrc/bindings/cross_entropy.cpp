#include "kernels/cross_entropy/cross_entropy.h"

#include "bindings/tensor_caster.h"

namespace py = pybind11;

void register_cross_entropy(py::module_& m) {
  m.def("cross_entropy_forward", &gptcore::cross_entropy_forward, py::arg("logits"), py::arg("targets"),
        py::arg("weight"), py::arg("ignore_index"), py::arg("label_smoothing"), py::arg("reduction"),
        py::arg("loss"), py::arg("lse"), py::call_guard<py::gil_scoped_release>(),
        "Cross-entropy of logits (N, V); writes lse where given.");
  m.def("cross_entropy_backward", &gptcore::cross_entropy_backward, py::arg("grad_loss"), py::arg("logits"),
        py::arg("targets"), py::arg("weight"), py::arg("lse"), py::arg("ignore_index"),
        py::arg("label_smoothing"), py::arg("reduction"), py::arg("dlogits"),
        py::call_guard<py::gil_scoped_release>(), "Gradient of cross_entropy_forward, overwritten.");
}
