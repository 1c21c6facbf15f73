#include "kernels/crc32c/crc32c.h"

#include "bindings/tensor_caster.h"

namespace py = pybind11;

void register_crc32c(py::module_& m) {
  m.def("crc32c", &gptcore::crc32c, py::arg("x"), py::arg("initial"), py::arg("out"),
        py::call_guard<py::gil_scoped_release_simple>(),
        "CRC-32C of the bytes of x after those that gave initial; copies them to out.");
}
