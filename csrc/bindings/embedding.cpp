#include "kernels/embedding/embedding.h"

#include "bindings/tensor_caster.h"

namespace py = pybind11;

void register_embedding(py::module_& m) {
  m.def("embedding_forward", &gptcore::embedding_forward, py::arg("ids"), py::arg("weight"), py::arg("out"),
        py::call_guard<py::gil_scoped_release>(), "out[n] = weight[ids[n]].");
  m.def("embedding_backward", &gptcore::embedding_backward, py::arg("ids"), py::arg("grad_out"),
        py::arg("dweight"), py::arg("accumulate"), py::call_guard<py::gil_scoped_release>(),
        "dweight[v] = (or +=) the sum of grad_out[n] over n with ids[n] == v.");
}
