#include "kernels/embedding/embedding.h"

#include "bindings/torch_function.h"

namespace py = pybind11;
using gptcore::bindings::Operand;

namespace {

// ctx.options = (V, C, weight.main_grad or None)
py::object embedding_eager_forward(py::handle ctx, py::handle ids, py::object weight) {
  static PyObject* const main_grad = gptcore::bindings::interned("main_grad");
  const Operand table(std::move(weight)), index = gptcore::bindings::contiguous(ids);
  const gptcore::TensorView& view = index.view();
  const gptcore::Checker check("embedding");
  check.ndim(table.view(), "weight", 2);
  gptcore::bindings::save_for_backward(ctx, ids);
  const int64_t vocabulary = table.view().size(0), width = table.view().size(1);
  gptcore::bindings::set_attribute(
      ctx, gptcore::bindings::options_name(),
      py::make_tuple(vocabulary, width, gptcore::bindings::attribute_or_none(table.tensor(), main_grad)));
  std::vector<int64_t> sizes(view.sizes, view.sizes + view.ndim);
  sizes.push_back(width);
  const Operand out = table.new_empty(sizes.data(), view.ndim + 1);
  {
    const py::gil_scoped_release release;
    gptcore::embedding_forward(view, table.view(), out.view());
  }
  return out.tensor();
}

py::object embedding_eager_backward(py::handle ctx, py::handle grad_out) {
  const py::tuple saved = gptcore::bindings::saved_tensors(ctx);
  const py::tuple options = gptcore::bindings::attribute(ctx, gptcore::bindings::options_name());
  const Operand index = gptcore::bindings::contiguous(saved[0]),
                gradient = gptcore::bindings::as_rows(grad_out);
  const bool accumulate = !options[2].is_none();
  const int64_t sizes[] = {py::cast<int64_t>(options[0]), py::cast<int64_t>(options[1])};
  const Operand dweight = accumulate ? Operand(options[2]) : gradient.new_empty(sizes, 2);
  {
    const py::gil_scoped_release release;
    gptcore::embedding_backward(index.view(), gradient.view(), dweight.view(), accumulate);
  }
  return py::make_tuple(py::none(), accumulate ? py::none() : dweight.tensor());
}

}  // namespace

void register_embedding(py::module_& m) {
  m.def("embedding_forward", &gptcore::embedding_forward, py::arg("ids"), py::arg("weight"), py::arg("out"),
        py::call_guard<py::gil_scoped_release>(), "out[n] = weight[ids[n]].");
  m.def("embedding_backward", &gptcore::embedding_backward, py::arg("ids"), py::arg("grad_out"),
        py::arg("dweight"), py::arg("accumulate"), py::call_guard<py::gil_scoped_release>(),
        "dweight[v] = (or +=) the sum of grad_out[n] over n with ids[n] == v.");
  m.def("embedding_eager_forward", &embedding_eager_forward, py::arg("ctx"), py::arg("ids"),
        py::arg("weight"), "Hook of torch.autograd.Function.");
  m.def("embedding_eager_backward", &embedding_eager_backward, py::arg("ctx"), py::arg("grad_out"),
        "Hook of torch.autograd.Function.");
}
