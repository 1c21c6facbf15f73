#include "kernels/layer_norm/layer_norm.h"

#include "bindings/torch_function.h"

namespace py = pybind11;
using gptcore::bindings::Operand;

namespace {

py::object layer_norm_eager_forward(py::handle ctx, py::handle input, py::object weight_tensor,
                                    py::object bias_tensor, double eps) {
  const Operand x = gptcore::bindings::as_rows(input), weight(std::move(weight_tensor)),
                bias(std::move(bias_tensor)), y = x.empty_like();
  const int64_t width = x.view().ndim ? x.view().size(-1) : 0;
  const int64_t sizes[] = {2, width ? x.view().numel() / width : 0};
  const Operand stats = x.new_empty(sizes, 2, true);
  gptcore::bindings::save_for_backward(ctx, x.tensor(), weight.tensor(), stats.tensor());
  {
    const py::gil_scoped_release release;
    gptcore::layer_norm_forward(x.view(), {}, weight.view(), bias.view(), eps, y.view(), {}, stats.view());
  }
  return y.tensor();
}

py::object layer_norm_eager_backward(py::handle ctx, py::handle grad_y) {
  static PyObject* const needs_input_grad = gptcore::bindings::interned("needs_input_grad");
  const py::tuple saved = gptcore::bindings::saved_tensors(ctx);
  const py::tuple needed = gptcore::bindings::attribute(ctx, needs_input_grad);
  const Operand gradient = gptcore::bindings::as_rows(grad_y), h = gptcore::bindings::as_rows(saved[0]),
                weight(saved[1]), stats(saved[2]), dx = h.empty_like(), dweight = weight.empty_like();
  const int64_t width = h.view().size(-1);
  const Operand dbias = needed[2].ptr() != Py_True ? Operand(py::none())
                        : weight.view()            ? weight.empty_like()
                                                   : h.new_empty(&width, 1);
  {
    const py::gil_scoped_release release;
    gptcore::layer_norm_backward(gradient.view(), {}, h.view(), weight.view(), stats.view(), dx.view(),
                                 dweight.view(), dbias.view());
  }
  return py::make_tuple(dx.tensor(), dweight.tensor(), dbias.tensor(), py::none());
}

}  // namespace

void register_layer_norm(py::module_& m) {
  m.def("layer_norm_forward", &gptcore::layer_norm_forward, py::arg("x"), py::arg("residual"),
        py::arg("weight"), py::arg("bias"), py::arg("eps"), py::arg("y"), py::arg("h"), py::arg("stats"),
        py::call_guard<py::gil_scoped_release>(),
        "y = layer_norm(x + residual) over (N, C); writes h and stats where given.");
  m.def("layer_norm_backward", &gptcore::layer_norm_backward, py::arg("grad_y"), py::arg("grad_h"),
        py::arg("h"), py::arg("weight"), py::arg("stats"), py::arg("dx"), py::arg("dweight"),
        py::arg("dbias"), py::call_guard<py::gil_scoped_release>(),
        "Gradients of layer_norm_forward, overwritten.");
  m.def("layer_norm_eager_forward", &layer_norm_eager_forward, py::arg("ctx"), py::arg("x"),
        py::arg("weight"), py::arg("bias"), py::arg("eps"), "Hook of torch.autograd.Function.");
  m.def("layer_norm_eager_backward", &layer_norm_eager_backward, py::arg("ctx"), py::arg("grad_y"),
        "Hook of torch.autograd.Function.");
}
