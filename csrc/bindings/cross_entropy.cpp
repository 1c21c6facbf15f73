#include "kernels/cross_entropy/cross_entropy.h"

#include "bindings/torch_function.h"

namespace py = pybind11;
using gptcore::bindings::Operand;

namespace {

struct Options {  // ignore_index, label_smoothing, reduction
  explicit Options(PyObject* const* values)
      : ignore_index(py::cast<int64_t>(py::handle(values[0]))),
        smoothing(py::cast<double>(py::handle(values[1]))),
        reduction(py::cast<std::string>(py::handle(values[2]))) {}
  int64_t ignore_index;
  double smoothing;
  std::string reduction;
};

// (logits, targets, weight, ignore_index, label_smoothing, reduction): the loss, or None, see its docstring. What
// Python asks about the tensors takes longer than the kernel where there are few logits.
py::object cross_entropy_plain(PyObject* const* arguments) {
  if (!gptcore::bindings::is_plain(arguments[0])) return py::none();
  const Operand logits = gptcore::bindings::operand(arguments[0]),
                targets = gptcore::bindings::operand(arguments[1]),
                weight = gptcore::bindings::operand(arguments[2]);
  const Options options(arguments + 3);
  const int64_t rows = logits.view().size(0);
  const Operand loss = logits.new_empty(&rows, options.reduction == "none");
  {
    const py::gil_scoped_release_simple release;
    gptcore::cross_entropy_forward(logits.view(), targets.view(), weight.view(), options.ignore_index,
                                   options.smoothing, options.reduction, loss.view(), {});
  }
  return loss.tensor();
}

// (ctx, logits, targets, weight, ignore_index, label_smoothing, reduction); ctx.options = the last three
py::object cross_entropy_eager_forward(PyObject* const* arguments) {
  const Operand logits = gptcore::bindings::as_rows(arguments[1]),
                targets = gptcore::bindings::operand(arguments[2]),
                weight = gptcore::bindings::operand(arguments[3]);
  const Options options(arguments + 4);
  const int64_t rows = logits.view().ndim ? logits.view().size(0) : 0;
  const Operand loss = logits.new_empty(&rows, options.reduction == "none"),
                lse = logits.new_empty(&rows, 1, true);
  {
    const py::gil_scoped_release_simple release;
    gptcore::cross_entropy_forward(logits.view(), targets.view(), weight.view(), options.ignore_index,
                                   options.smoothing, options.reduction, loss.view(), lse.view());
  }
  gptcore::bindings::save_for_backward(arguments[0], py::handle(arguments[1]), targets.tensor(),
                                       weight.tensor(), lse.tensor());
  gptcore::bindings::set_attribute(
      arguments[0], gptcore::bindings::options_name(),
      gptcore::bindings::checked(PyTuple_Pack(3, arguments[4], arguments[5], arguments[6])));
  return loss.tensor();
}

// (ctx, grad_loss)
py::object cross_entropy_eager_backward(PyObject* const* arguments) {
  const py::tuple saved = gptcore::bindings::saved_tensors(arguments[0]);
  const py::tuple kept = gptcore::bindings::attribute(arguments[0], gptcore::bindings::options_name());
  const Options options(PySequence_Fast_ITEMS(kept.ptr()));
  const Operand gradient = gptcore::bindings::operand(arguments[1]),
                logits = gptcore::bindings::as_rows(saved[0]), targets(saved[1]), weight(saved[2]),
                lse(saved[3]), dlogits = logits.empty_like();
  {
    const py::gil_scoped_release_simple release;
    gptcore::cross_entropy_backward(gradient.view(), logits.view(), targets.view(), weight.view(), lse.view(),
                                    options.ignore_index, options.smoothing, options.reduction,
                                    dlogits.view());
  }
  const py::none none;
  return gptcore::bindings::checked(
      PyTuple_Pack(6, dlogits.tensor().ptr(), none.ptr(), none.ptr(), none.ptr(), none.ptr(), none.ptr()));
}

}  // namespace

void register_cross_entropy(py::module_& m) {
  m.def("cross_entropy_forward", &gptcore::cross_entropy_forward, py::arg("logits"), py::arg("targets"),
        py::arg("weight"), py::arg("ignore_index"), py::arg("label_smoothing"), py::arg("reduction"),
        py::arg("loss"), py::arg("lse"), py::call_guard<py::gil_scoped_release_simple>(),
        "Cross-entropy of logits (N, V); writes lse where given.");
  m.def("cross_entropy_backward", &gptcore::cross_entropy_backward, py::arg("grad_loss"), py::arg("logits"),
        py::arg("targets"), py::arg("weight"), py::arg("lse"), py::arg("ignore_index"),
        py::arg("label_smoothing"), py::arg("reduction"), py::arg("dlogits"),
        py::call_guard<py::gil_scoped_release_simple>(), "Gradient of cross_entropy_forward, overwritten.");
  gptcore::bindings::define<cross_entropy_plain, 6>(
      m, "cross_entropy_plain",
      "cross_entropy_plain(logits: object, targets: object, weight: object, ignore_index: int, "
      "label_smoothing: float, reduction: str) -> object\n\n"
      "The loss of a torch tensor's logits; None, with nothing done, where they have to be copied first or "
      "come "
      "from elsewhere.");
  gptcore::bindings::define_hooks<cross_entropy_eager_forward, 6, cross_entropy_eager_backward>(
      m, "cross_entropy",
      "logits: object, targets: object, weight: object, ignore_index: int, label_smoothing: float, "
      "reduction: str",
      "grad_loss: object");
}
