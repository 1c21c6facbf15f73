#include "kernels/moe_router/moe_router.h"

#include "bindings/tensor_caster.h"

namespace py = pybind11;

void register_moe_router(py::module_& m) {
  m.def("moe_router_forward", &gptcore::moe_router_forward, py::arg("logits"), py::arg("mask"),
        py::arg("priority"), py::arg("uniforms"), py::arg("renormalise"), py::arg("by_gate"),
        py::arg("second_threshold"), py::arg("capacity"), py::arg("count_all"), py::arg("experts"),
        py::arg("gates"), py::arg("rows"), py::arg("offsets"), py::arg("requested"), py::arg("balance_loss"),
        py::arg("z_loss"), py::arg("entropy"), py::arg("lse"), py::arg("share"),
        py::call_guard<py::gil_scoped_release_simple>(),
        "The K experts of every token, their gates and places, and the losses.");
  m.def("moe_router_backward", &gptcore::moe_router_backward, py::arg("dgates"), py::arg("dbalance_loss"),
        py::arg("dz_loss"), py::arg("logits"), py::arg("experts"), py::arg("rows"), py::arg("lse"),
        py::arg("share"), py::arg("renormalise"), py::arg("dlogits"),
        py::call_guard<py::gil_scoped_release_simple>(), "Gradient of the router's logits, overwritten.");
}
