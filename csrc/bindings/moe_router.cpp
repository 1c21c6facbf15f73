#include "kernels/moe_router/moe_router.h"

#include <algorithm>

#include "bindings/torch_function.h"

namespace py = pybind11;
using gptcore::bindings::Operand;

namespace {

constexpr int kInputs = 10, kOutputs = 10;

// (ctx, logits, mask, priority, uniforms, top_k, renormalise, by_gate, second_threshold, capacity, count_all): the
// outputs in the order of MoERouting. Ten of them through Python's frames take as long as the kernel does.
py::object moe_router_eager_forward(PyObject* const* arguments) {
  const Operand logits = gptcore::bindings::last_contiguous(arguments[1]),
                mask = gptcore::bindings::operand(arguments[2]),
                priority = gptcore::bindings::operand(arguments[3]),
                uniforms = gptcore::bindings::operand(arguments[4]);
  if (logits.view().ndim != 2) {
    gptcore::Checker("moe_router")
        .fail("logits", std::to_string(logits.view().ndim) + " dimensions", "2: (tokens, experts)");
  }
  const auto number = [&](int place) { return py::cast<int64_t>(py::handle(arguments[place])); };
  const auto flag = [&](int place) { return py::cast<bool>(py::handle(arguments[place])); };
  const int64_t tokens = logits.view().size(0), count = logits.view().size(1), bounds = count + 1,
                choices[] = {tokens, std::max<int64_t>(number(5), 0)};
  const Operand gates = logits.new_empty(choices, 2, true), experts = logits.new_int32(choices, 2),
                rows = logits.new_int32(choices, 2), offsets = logits.new_int32(&bounds, 1),
                requested = logits.new_int32(&count, 1), balance_loss = logits.new_empty(nullptr, 0, true),
                z_loss = logits.new_empty(nullptr, 0, true), entropy = logits.new_empty(nullptr, 0, true),
                lse = logits.new_empty(&tokens, 1, true), share = logits.new_empty(&count, 1, true);
  const bool renormalise = flag(6), by_gate = flag(7), count_all = flag(10);
  const double second_threshold = py::cast<double>(py::handle(arguments[8]));
  const int64_t capacity = number(9);
  {
    const py::gil_scoped_release_simple release;
    gptcore::moe_router_forward(logits.view(), mask.view(), priority.view(), uniforms.view(), renormalise,
                                by_gate, second_threshold, capacity, count_all, experts.view(), gates.view(),
                                rows.view(), offsets.view(), requested.view(), balance_loss.view(),
                                z_loss.view(), entropy.view(), lse.view(), share.view());
  }
  const py::handle ctx = arguments[0];
  gptcore::bindings::save_for_backward(ctx, py::handle(arguments[1]), experts.tensor(), rows.tensor(),
                                       lse.tensor(), share.tensor());
  gptcore::bindings::mark_non_differentiable(ctx, experts.tensor(), rows.tensor(), offsets.tensor(),
                                             requested.tensor(), entropy.tensor(), lse.tensor(),
                                             share.tensor());
  gptcore::bindings::set_attribute(ctx, gptcore::bindings::options_name(), py::bool_(renormalise));
  return gptcore::bindings::checked(
      PyTuple_Pack(kOutputs, gates.tensor().ptr(), experts.tensor().ptr(), rows.tensor().ptr(),
                   offsets.tensor().ptr(), requested.tensor().ptr(), balance_loss.tensor().ptr(),
                   z_loss.tensor().ptr(), entropy.tensor().ptr(), lse.tensor().ptr(), share.tensor().ptr()));
}

// (ctx, a gradient or None for each output); those of gates, balance_loss and z_loss count.
py::object moe_router_eager_backward(PyObject* const* arguments) {
  PyObject *const gates = arguments[1], *const balance = arguments[6], *const z = arguments[7];
  const auto gradients = [](const py::object& dlogits) {
    py::tuple each(kInputs);
    for (size_t i = 0; i < kInputs; ++i) each[i] = i == 0 ? dlogits : py::none();
    return each;
  };
  if (gates == Py_None && balance == Py_None && z == Py_None) return gradients(py::none());
  const py::tuple saved = gptcore::bindings::saved_tensors(arguments[0]);
  const Operand dgates = gates == Py_None ? Operand(py::none()) : gptcore::bindings::contiguous(gates),
                dbalance = gptcore::bindings::operand(balance), dz = gptcore::bindings::operand(z),
                logits = gptcore::bindings::last_contiguous(saved[0]), experts(saved[1]), rows(saved[2]),
                lse(saved[3]), share(saved[4]), dlogits = logits.empty_like();
  const bool renormalise =
      gptcore::bindings::attribute(arguments[0], gptcore::bindings::options_name()).ptr() == Py_True;
  {
    const py::gil_scoped_release_simple release;
    gptcore::moe_router_backward(dgates.view(), dbalance.view(), dz.view(), logits.view(), experts.view(),
                                 rows.view(), lse.view(), share.view(), renormalise, dlogits.view());
  }
  return gradients(dlogits.tensor());
}

}  // namespace

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
  gptcore::bindings::define<moe_router_eager_forward, 1 + kInputs>(
      m, "moe_router_eager_forward",
      "moe_router_eager_forward(ctx: object, logits: object, mask: object, priority: object, uniforms: "
      "object, top_k: int, renormalise: bool, by_gate: bool, second_threshold: float, capacity: int, "
      "count_all: bool) -> object\n\nHook of torch.autograd.Function.");
  gptcore::bindings::define<moe_router_eager_backward, 1 + kOutputs>(
      m, "moe_router_eager_backward",
      "moe_router_eager_backward(ctx: object, dgates: object, dexperts: object, drows: object, "
      "doffsets: object, drequested: object, dbalance_loss: object, dz_loss: object, dentropy: object, "
      "dlse: object, dshare: object) -> object\n\nHook of torch.autograd.Function.");
}
