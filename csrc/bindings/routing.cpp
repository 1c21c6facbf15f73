#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <utility>
#include <vector>

namespace py = pybind11;

namespace {

// How an op's call on torch tensors is to run, asked of torch's own functions once per call; from Python the same
// questions cost a microsecond.
class Routing {
 public:
  // through the dispatcher; straight to the kernel; through autograd
  enum Route { kDispatcher = -1, kKernel = 0, kAutograd = 1 };

  // tensor, parameter: the types without behaviour of their own. is_listening: functions whose results are 0 or None
  // unless a mode or transform wants to see every call.
  Routing(py::object tensor, py::object parameter, py::object is_grad_enabled,
          std::vector<py::object> is_listening)
      : tensor_(std::move(tensor)),
        parameter_(std::move(parameter)),
        is_grad_enabled_(std::move(is_grad_enabled)),
        is_listening_(std::move(is_listening)),
        requires_grad_("requires_grad") {}

  int route(const py::tuple& arguments) const {
    for (const py::object& listening : is_listening_) {
      const py::object answer = listening();
      if (!answer.is_none() && PyObject_IsTrue(answer.ptr())) return kDispatcher;
    }
    bool wanted = false;
    for (const py::handle argument : arguments) {
      PyObject* value = argument.ptr();
      auto* type = reinterpret_cast<PyObject*>(Py_TYPE(value));
      if (type == tensor_.ptr() || type == parameter_.ptr()) {
        wanted = wanted || py::object(argument.attr(requires_grad_)).ptr() == Py_True;
      } else if (value != Py_None && !PyLong_Check(value) && !PyFloat_CheckExact(value) &&
                 py::isinstance(argument, tensor_)) {
        return kDispatcher;
      }
    }
    return wanted && is_grad_enabled_().ptr() == Py_True ? kAutograd : kKernel;
  }

 private:
  py::object tensor_, parameter_, is_grad_enabled_;
  std::vector<py::object> is_listening_;
  py::str requires_grad_;
};

}  // namespace

void register_routing(py::module_& m) {
  py::class_<Routing>(m, "Routing", "How calls of ops on torch tensors are to run.")
      .def(py::init<py::object, py::object, py::object, std::vector<py::object>>(), py::arg("tensor"),
           py::arg("parameter"), py::arg("is_grad_enabled"), py::arg("is_listening"))
      .def("route", &Routing::route, py::arg("arguments"),
           "-1: through torch's dispatcher, 0: straight to the kernel, 1: through autograd.");
}
