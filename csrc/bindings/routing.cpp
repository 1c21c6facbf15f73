// Which way a call of an op takes through torch, and its backward: asked of torch's own functions, from here since
// the same questions cost microseconds from Python, as much as the small ops themselves.
#include <new>
#include <stdexcept>
#include <string>

#include "bindings/torch_function.h"

namespace py = pybind11;
using gptcore::bindings::checked;

namespace {

PyObject* call(const py::object& function, PyObject* const* arguments, Py_ssize_t count) {
  return PyObject_Vectorcall(function.ptr(), arguments, static_cast<size_t>(count), nullptr);
}

bool is_true(const py::object& question) {
  return checked(PyObject_CallNoArgs(question.ptr())).ptr() == Py_True;
}

// Whether a mode or transform answers, by something other than 0 or None, that it wants to see every call.
bool is_listening(py::handle question) {
  const py::object answer = checked(PyObject_CallNoArgs(question.ptr()));
  return !answer.is_none() && PyObject_IsTrue(answer.ptr());
}

// A Python callable over a T, whose operator()(arguments, count) returns a new reference or null with Python's error
// set. A builtin function: pybind11's callables take up to half a microsecond to look at their arguments.
template <class T>
py::object callable(T* state) {
  const auto entry = +[](PyObject* self, PyObject* const* arguments, Py_ssize_t count) -> PyObject* {
    try {
      return (*static_cast<const T*>(PyCapsule_GetPointer(self, nullptr)))(arguments, count);
    } catch (py::error_already_set& error) {
      error.restore();
    } catch (const py::builtin_exception& error) {
      error.set_error();
    }
    return nullptr;
  };
  static PyMethodDef definition{T::kName, gptcore::bindings::as_method(entry), METH_FASTCALL, nullptr};
  const py::capsule owner(state, [](void* pointer) { delete static_cast<T*>(pointer); });
  return checked(PyCFunction_New(&definition, owner.ptr()));
}

struct Router {
  static constexpr const char* kName = "route";
  py::str name;
  py::object tensor, parameter, is_grad_enabled;
  py::tuple questions;
  py::object kernel, autograd, dispatcher;

  PyObject* operator()(PyObject* const* arguments, Py_ssize_t count) const {
    return call(route(arguments, count), arguments, count);
  }

 private:
  const py::object& route(PyObject* const* arguments, Py_ssize_t count) const {
    static PyObject* const requires_grad = gptcore::bindings::interned("requires_grad");
    bool any = false, wanted = false;
    PyObject* foreign = nullptr;
    for (Py_ssize_t i = 0; i < count; ++i) {
      PyObject* value = arguments[i];
      auto* type = reinterpret_cast<PyObject*>(Py_TYPE(value));
      if (type == tensor.ptr() || type == parameter.ptr()) {
        any = true;
        wanted = wanted || gptcore::bindings::attribute(value, requires_grad).ptr() == Py_True;
      } else if (value != Py_None && !PyLong_Check(value) && !PyFloat_Check(value) &&
                 !PyUnicode_CheckExact(value)) {
        if (py::isinstance(value, tensor)) return dispatcher;
        if (PyObject_HasAttrString(value, "__dlpack__")) foreign = value;
      }
    }
    for (const py::handle question : questions) {
      if (any && is_listening(question)) return dispatcher;
    }
    if (!wanted || !is_true(is_grad_enabled)) return kernel;
    if (foreign) refuse(foreign);
    return autograd;
  }

  [[noreturn]] void refuse(PyObject* foreign) const {
    throw py::type_error(std::string(name) + ": got a " + Py_TYPE(foreign)->tp_name +
                         " beside torch tensors that require a gradient, expected torch tensors alone");
  }
};

struct Backward {
  static constexpr const char* kName = "backward";
  py::object direct, general, is_grad_enabled, transform;

  PyObject* operator()(PyObject* const* arguments, Py_ssize_t count) const {
    const bool once = !is_true(is_grad_enabled) && !is_listening(transform);
    return call(once ? direct : general, arguments, count);
  }
};

py::object kept(PyObject* object) { return py::reinterpret_borrow<py::object>(object); }

py::object router(PyObject* const* arguments) {
  const auto name = py::str(kept(arguments[7]));
  return callable(new Router{name, kept(arguments[0]), kept(arguments[1]), kept(arguments[2]),
                             py::tuple(kept(arguments[3])), kept(arguments[4]), kept(arguments[5]),
                             kept(arguments[6])});
}

py::object backward_method(PyObject* const* arguments) {
  const py::object function =
      callable(new Backward{kept(arguments[0]), kept(arguments[1]), kept(arguments[2]), kept(arguments[3])});
  return checked(PyInstanceMethod_New(function.ptr()));
}

}  // namespace

namespace gptcore::bindings {

PyObject* run(Body body, Py_ssize_t expected, PyObject* const* arguments, Py_ssize_t count) {
  if (count != expected) {
    return PyErr_Format(PyExc_TypeError, "gptcore: got %zd arguments, expected %zd", count, expected);
  }
  try {
    return body(arguments).release().ptr();
  } catch (py::error_already_set& error) {
    error.restore();
  } catch (const py::builtin_exception& error) {
    error.set_error();
  } catch (const TypeError& error) {
    PyErr_SetString(PyExc_TypeError, error.what());
  } catch (const std::invalid_argument& error) {
    PyErr_SetString(PyExc_ValueError, error.what());
  } catch (const std::bad_alloc&) {
    PyErr_NoMemory();
  } catch (const std::exception& error) {
    PyErr_SetString(PyExc_RuntimeError, error.what());
  }
  return nullptr;
}

}  // namespace gptcore::bindings

void register_routing(py::module_& m) {
  gptcore::bindings::define<router, 8>(
      m, "router",
      "router(tensor: type, parameter: type, is_grad_enabled: Callable, is_listening: Sequence, "
      "kernel: Callable, autograd: Callable, dispatcher: Callable, name: str) -> Callable\n\n"
      "Passes its positional arguments to dispatcher where one of is_listening answers or a tensor has a "
      "type with behaviour of its own, to autograd where a gradient is wanted, else to kernel. Refuses other "
      "arrays beside tensors that want a gradient. name: the op, for that error.");
  gptcore::bindings::define<backward_method, 4>(
      m, "backward_method",
      "backward_method(direct: Callable, general: Callable, is_grad_enabled: Callable, transform: Callable) "
      "-> object\n\n"
      "A method that passes (ctx, *gradients) to direct, but to general where gradients are enabled or "
      "transform "
      "answers.");
}
