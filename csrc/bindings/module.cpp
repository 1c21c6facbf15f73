// _C: one register_<op>(m) line per op, and what Python may ask about the machine.
#include "bindings/tensor_caster.h"
#include "core/arena.h"
#include "core/isa.h"
#include "core/parallel.h"

namespace py = pybind11;
using gptcore::TensorView;

void register_attention(py::module_& m);
void register_layer_norm(py::module_& m);
void register_cross_entropy(py::module_& m);
void register_linear_cross_entropy(py::module_& m);
void register_matmul(py::module_& m);
void register_gated_activation(py::module_& m);
void register_adamw(py::module_& m);
void register_rotary(py::module_& m);
void register_embedding(py::module_& m);
void register_rms_norm(py::module_& m);

namespace {

// Does nothing with three tensors: what crossing the boundary costs.
void noop(const TensorView&, const TensorView&, const TensorView&) {}

// What the arguments of an op are, for its choice of route: kOther where there is anything but plain tensors (no
// subclass), numbers and None.
constexpr int kOther = -1, kNoGradient = 0, kGradient = 1;

int classify_arguments(const py::tuple& arguments, py::handle tensor, py::handle parameter) {
  static PyObject* const requires_grad = PyUnicode_InternFromString("requires_grad");
  int result = kNoGradient;
  for (const py::handle argument : arguments) {
    const auto* type = reinterpret_cast<PyObject*>(Py_TYPE(argument.ptr()));
    if (type == tensor.ptr() || type == parameter.ptr()) {
      const auto wanted = py::reinterpret_steal<py::object>(PyObject_GetAttr(argument.ptr(), requires_grad));
      if (!wanted) throw py::error_already_set();
      if (wanted.ptr() == Py_True) result = kGradient;
    } else if (!argument.is_none() && !PyFloat_CheckExact(argument.ptr()) && !PyLong_Check(argument.ptr()) &&
               py::isinstance(argument, tensor)) {
      return kOther;
    }
  }
  return result;
}

void register_machine(py::module_& m) {
  m.def("isa", [] { return gptcore::name_of(gptcore::current_isa()); }, "The instruction set in use.");
  m.def("set_isa", &gptcore::set_isa, py::arg("name"), "Use another instruction set of available_isas().");
  m.def(
      "available_isas",
      [] {
        py::list names;
        for (int i = 0; i <= static_cast<int>(gptcore::best_isa()); ++i) {
          names.append(gptcore::name_of(static_cast<gptcore::Isa>(i)));
        }
        return names;
      },
      "Instruction sets this machine can run, lowest first.");
  m.def("num_threads", &gptcore::num_threads, "Threads that parallel loops use.");
  m.def("num_threads_reason", &gptcore::num_threads_reason, "Why num_threads() is what it is.");
  m.def("set_num_threads", &gptcore::set_num_threads, py::arg("count"), "0 returns to the default.");
  m.def("scratch_bytes", &gptcore::scratch_bytes, "Bytes held by the kernels' scratch stacks.");
  m.def("noop", &noop, py::arg("a"), py::arg("b"), py::arg("c"), py::call_guard<py::gil_scoped_release>(),
        "An empty kernel over three tensors, to measure the boundary.");
  m.def("classify_arguments", &classify_arguments, py::arg("arguments"), py::arg("tensor"),
        py::arg("parameter"),
        "1 where a tensor requires a gradient, 0 where none does, -1 where there is a tensor of another type "
        "than the two given.");
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "gptcore's native kernels";
  m.attr("__version__") = GPTCORE_VERSION;
  py::register_local_exception_translator([](std::exception_ptr pointer) {
    try {
      if (pointer) std::rethrow_exception(pointer);
    } catch (const gptcore::TypeError& error) {
      PyErr_SetString(PyExc_TypeError, error.what());
    }
  });
  register_machine(m);
  register_attention(m);
  register_layer_norm(m);
  register_cross_entropy(m);
  register_linear_cross_entropy(m);
  register_matmul(m);
  register_gated_activation(m);
  register_adamw(m);
  register_rotary(m);
  register_embedding(m);
  register_rms_norm(m);
}
