#include "kernels/matmul/matmul.h"

#include "bindings/tensor_caster.h"

namespace py = pybind11;

void register_matmul(py::module_& m) {
  m.def("matmul", &gptcore::matmul, py::arg("a"), py::arg("b"), py::arg("bias"), py::arg("out"),
        py::arg("accumulate"), py::arg("transpose_a"), py::arg("transpose_b"),
        py::call_guard<py::gil_scoped_release_simple>(),
        "out (+)= a b (+ bias) for few rows, or bf16 x bf16 into f32.");
}
