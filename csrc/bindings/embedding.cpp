#include "kernels/embedding/embedding.h"

#include "bindings/torch_function.h"

namespace py = pybind11;
using gptcore::bindings::Operand;

namespace {

// (ctx, ids, weight); ctx.options = (V, weight.main_grad or None)
py::object embedding_eager_forward(PyObject* const* arguments) {
  static PyObject* const main_grad = gptcore::bindings::interned("main_grad");
  const py::handle ctx = arguments[0], ids = arguments[1];
  const Operand table = gptcore::bindings::operand(arguments[2]), index = gptcore::bindings::contiguous(ids);
  const gptcore::TensorView& view = index.view();
  const gptcore::Checker check("embedding");
  check.ndim(table.view(), "weight", 2);
  gptcore::bindings::save_for_backward(ctx, ids);
  gptcore::bindings::set_attribute(
      ctx, gptcore::bindings::options_name(),
      py::make_tuple(table.view().size(0), gptcore::bindings::attribute_or_none(table.tensor(), main_grad)));
  std::vector<int64_t> sizes(view.sizes, view.sizes + view.ndim);
  sizes.push_back(table.view().size(1));
  const Operand out = table.new_empty(sizes.data(), view.ndim + 1);
  {
    const py::gil_scoped_release_simple release;
    gptcore::embedding_forward(view, table.view(), out.view());
  }
  return out.tensor();
}

// (ctx, grad_out)
py::object embedding_eager_backward(PyObject* const* arguments) {
  const py::tuple saved = gptcore::bindings::saved_tensors(arguments[0]);
  const py::tuple options = gptcore::bindings::attribute(arguments[0], gptcore::bindings::options_name());
  const Operand index = gptcore::bindings::contiguous(saved[0]),
                gradient = gptcore::bindings::as_rows(arguments[1]);
  const bool accumulate = !options[1].is_none();
  const int64_t sizes[] = {py::cast<int64_t>(options[0]), gradient.view().size(-1)};
  const Operand dweight = accumulate ? Operand(options[1]) : gradient.new_empty(sizes, 2);
  {
    const py::gil_scoped_release_simple release;
    gptcore::embedding_backward(index.view(), gradient.view(), dweight.view(), accumulate);
  }
  return py::make_tuple(py::none(), accumulate ? py::none() : dweight.tensor());
}

}  // namespace

void register_embedding(py::module_& m) {
  m.def("embedding_forward", &gptcore::embedding_forward, py::arg("ids"), py::arg("weight"), py::arg("out"),
        py::call_guard<py::gil_scoped_release_simple>(), "out[n] = weight[ids[n]].");
  m.def("embedding_backward", &gptcore::embedding_backward, py::arg("ids"), py::arg("grad_out"),
        py::arg("dweight"), py::arg("accumulate"), py::call_guard<py::gil_scoped_release_simple>(),
        "dweight[v] = (or +=) the sum of grad_out[n] over n with ids[n] == v.");
  gptcore::bindings::define_hooks<embedding_eager_forward, 2, embedding_eager_backward>(
      m, "embedding", "ids: object, weight: object", "grad_out: object");
}
