#include "kernels/layer_norm/layer_norm.h"

#include "bindings/torch_function.h"

namespace py = pybind11;
using gptcore::bindings::Operand;

namespace {

PyObject* weight_offset() {
  static PyObject* const name = gptcore::bindings::interned("weight_offset");
  return name;
}

// (ctx, x, weight, bias, eps, weight_offset)
py::object layer_norm_eager_forward(PyObject* const* arguments) {
  const Operand x = gptcore::bindings::as_rows(arguments[1]),
                weight = gptcore::bindings::operand(arguments[2]),
                bias = gptcore::bindings::operand(arguments[3]), y = x.empty_like();
  const float eps = py::cast<float>(arguments[4]), offset = py::cast<float>(arguments[5]);
  const int64_t width = x.view().ndim ? x.view().size(-1) : 0;
  const int64_t sizes[] = {2, width ? x.view().numel() / width : 0};
  const Operand stats = x.new_empty(sizes, 2, true);
  gptcore::bindings::save_for_backward(arguments[0], x.tensor(), weight.tensor(), stats.tensor());
  gptcore::bindings::set_attribute(arguments[0], weight_offset(), arguments[5]);
  {
    const py::gil_scoped_release_simple release;
    gptcore::layer_norm_forward(x.view(), {}, weight.view(), bias.view(), eps, offset, y.view(), {},
                                stats.view());
  }
  return y.tensor();
}

// (ctx, grad_y)
py::object layer_norm_eager_backward(PyObject* const* arguments) {
  static PyObject* const needs_input_grad = gptcore::bindings::interned("needs_input_grad");
  const py::tuple saved = gptcore::bindings::saved_tensors(arguments[0]);
  const py::tuple needed = gptcore::bindings::attribute(arguments[0], needs_input_grad);
  const float offset = py::cast<float>(gptcore::bindings::attribute(arguments[0], weight_offset()));
  const Operand gradient = gptcore::bindings::as_rows(arguments[1]), h = gptcore::bindings::as_rows(saved[0]),
                weight(saved[1]), stats(saved[2]), dx = h.empty_like(), dweight = weight.empty_like();
  const int64_t width = h.view().size(-1);
  const Operand dbias = needed[2].ptr() != Py_True ? Operand(py::none())
                        : weight.view()            ? weight.empty_like()
                                                   : h.new_empty(&width, 1);
  {
    const py::gil_scoped_release_simple release;
    gptcore::layer_norm_backward(gradient.view(), {}, h.view(), weight.view(), offset, stats.view(),
                                 dx.view(), dweight.view(), dbias.view());
  }
  return py::make_tuple(dx.tensor(), dweight.tensor(), dbias.tensor(), py::none(), py::none());
}

// (x, weight, bias, eps, weight_offset, out)
py::object layer_norm_plain(PyObject* const* arguments) {
  PyObject *const x_object = arguments[0], *const out = arguments[5];
  const bool fresh = out == Py_None;
  if (!gptcore::bindings::is_plain(x_object)) return py::none();
  if (!fresh && gptcore::bindings::wants_grad(x_object, arguments[1], arguments[2])) return py::none();
  const Operand x = gptcore::bindings::operand(x_object), weight = gptcore::bindings::operand(arguments[1]),
                bias = gptcore::bindings::operand(arguments[2]),
                y = fresh ? x.empty_like() : gptcore::bindings::operand(out);
  const float eps = py::cast<float>(arguments[3]), offset = py::cast<float>(arguments[4]);
  {
    const py::gil_scoped_release_simple release;
    gptcore::layer_norm_forward(x.view(), {}, weight.view(), bias.view(), eps, offset, y.view(), {}, {});
  }
  return y.tensor();
}

}  // namespace

void register_layer_norm(py::module_& m) {
  m.def("layer_norm_forward", &gptcore::layer_norm_forward, py::arg("x"), py::arg("residual"),
        py::arg("weight"), py::arg("bias"), py::arg("eps"), py::arg("weight_offset"), py::arg("y"),
        py::arg("h"), py::arg("stats"), py::call_guard<py::gil_scoped_release_simple>(),
        "y = layer_norm(x + residual) over (N, C); writes h and stats where given.");
  m.def("layer_norm_backward", &gptcore::layer_norm_backward, py::arg("grad_y"), py::arg("grad_h"),
        py::arg("h"), py::arg("weight"), py::arg("weight_offset"), py::arg("stats"), py::arg("dx"),
        py::arg("dweight"), py::arg("dbias"), py::call_guard<py::gil_scoped_release_simple>(),
        "Gradients of layer_norm_forward, overwritten.");
  gptcore::bindings::define<layer_norm_plain, 6>(
      m, "layer_norm_plain",
      "layer_norm_plain(x: object, weight: object, bias: object, eps: float, weight_offset: float, "
      "out: object) -> object\n\n"
      "layer_norm of a torch tensor, into out or, for None, a fresh tensor; None, with nothing done, where x "
      "has "
      "to be copied first, comes from elsewhere, or a gradient is wanted beside out.");
  gptcore::bindings::define_hooks<layer_norm_eager_forward, 5, layer_norm_eager_backward>(
      m, "layer_norm", "x: object, weight: object, bias: object, eps: float, weight_offset: float",
      "grad_y: object");
}
