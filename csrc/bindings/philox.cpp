#include "kernels/philox/philox.h"

#include "bindings/tensor_caster.h"

namespace py = pybind11;

void register_philox(py::module_& m) {
  m.def("philox", &gptcore::philox, py::arg("counters"), py::arg("seed"), py::arg("out"),
        py::call_guard<py::gil_scoped_release_simple>(), "Philox4x32-10 of each row of four int32 words.");
}
