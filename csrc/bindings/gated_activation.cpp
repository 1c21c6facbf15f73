#include "kernels/gated_activation/gated_activation.h"

#include "bindings/torch_function.h"

namespace py = pybind11;
using gptcore::bindings::Operand;

namespace {

constexpr int kPacked = 4;  // kinds from here on: gate and up in one tensor

Operand half_of(const Operand& packed) {
  const gptcore::TensorView& view = packed.view();
  std::vector<int64_t> sizes(view.sizes, view.sizes + view.ndim);
  if (!sizes.empty()) sizes.back() /= 2;
  return packed.new_empty(sizes.data(), view.ndim);
}

// (ctx, gate, up, gate_bias, up_bias, kind); ctx.options = kind
py::object gated_activation_eager_forward(PyObject* const* arguments) {
  const Operand gate = gptcore::bindings::as_rows(arguments[1]),
                up = gptcore::bindings::as_rows(arguments[2]),
                gate_bias = gptcore::bindings::operand(arguments[3]),
                up_bias = gptcore::bindings::operand(arguments[4]);
  const py::handle ctx = arguments[0], kind = arguments[5];
  const int number = py::cast<int>(kind);
  const Operand y = number < kPacked ? gate.empty_like() : half_of(gate);
  gptcore::bindings::save_for_backward(ctx, gate.tensor(), up.tensor(), gate_bias.tensor(), up_bias.tensor());
  gptcore::bindings::set_attribute(ctx, gptcore::bindings::options_name(), kind);
  {
    const py::gil_scoped_release_simple release;
    gptcore::gated_activation_forward(number, gate.view(), up.view(), gate_bias.view(), up_bias.view(),
                                      y.view());
  }
  return y.tensor();
}

// (ctx, grad_y)
py::object gated_activation_eager_backward(PyObject* const* arguments) {
  const py::handle ctx = arguments[0];
  const py::tuple saved = gptcore::bindings::saved_tensors(ctx);
  const int kind = py::cast<int>(gptcore::bindings::attribute(ctx, gptcore::bindings::options_name()));
  const Operand gradient = gptcore::bindings::as_rows(arguments[1]),
                gate = gptcore::bindings::as_rows(saved[0]), up = gptcore::bindings::as_rows(saved[1]),
                gate_bias(saved[2]), up_bias(saved[3]);
  const Operand dgate = gate.empty_like(), dup = up.empty_like(), dgate_bias = gate_bias.empty_like(),
                dup_bias = up_bias.empty_like();
  {
    const py::gil_scoped_release_simple release;
    gptcore::gated_activation_backward(kind, gradient.view(), gate.view(), up.view(), gate_bias.view(),
                                       up_bias.view(), dgate.view(), dup.view(), dgate_bias.view(),
                                       dup_bias.view());
  }
  return py::make_tuple(dgate.tensor(), dup.tensor(), dgate_bias.tensor(), dup_bias.tensor(), py::none());
}

}  // namespace

void register_gated_activation(py::module_& m) {
  m.def("gated_activation_forward", &gptcore::gated_activation_forward, py::arg("kind"), py::arg("gate"),
        py::arg("up"), py::arg("gate_bias"), py::arg("up_bias"), py::arg("y"),
        py::call_guard<py::gil_scoped_release_simple>(),
        "y = act(gate + gate_bias) [* (up + up_bias)]; kind: 0 gelu_tanh, 1 gelu_erf, 2 silu, 3 relu, "
        "+4 gated with gate and up packed in one tensor.");
  m.def("gated_activation_backward", &gptcore::gated_activation_backward, py::arg("kind"), py::arg("grad_y"),
        py::arg("gate"), py::arg("up"), py::arg("gate_bias"), py::arg("up_bias"), py::arg("dgate"),
        py::arg("dup"), py::arg("dgate_bias"), py::arg("dup_bias"),
        py::call_guard<py::gil_scoped_release_simple>(),
        "Gradients of gated_activation_forward, overwritten.");
  gptcore::bindings::define_hooks<gated_activation_eager_forward, 5, gated_activation_eager_backward>(
      m, "gated_activation", "gate: object, up: object, gate_bias: object, up_bias: object, kind: int",
      "grad_y: object");
}
