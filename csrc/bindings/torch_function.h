// What the eager autograd hooks of small ops need of torch, by way of its Python objects: an op of a microsecond
// would spend several in Python's frames. Nothing here knows torch's C++ interface.
//
// A hook is what torch.autograd.Function calls: forward(ctx, *inputs) and backward(ctx, *gradients).
#pragma once

#include <algorithm>
#include <iterator>
#include <string>
#include <utility>
#include <vector>

#include "bindings/tensor_caster.h"

namespace gptcore::bindings {

// --- Python's C interface with errors as exceptions ----------------------------------------------------------

inline py::object checked(PyObject* result) {
  if (!result) throw py::error_already_set();
  return py::reinterpret_steal<py::object>(result);
}

// Kept for the life of the process, since a static py::object would outlive the interpreter.
inline PyObject* interned(const char* name) { return PyUnicode_InternFromString(name); }
inline PyObject* imported(const char* module, const char* name) {
  return py::object(py::module_::import(module).attr(name)).release().ptr();
}

inline py::object attribute(py::handle object, PyObject* name) {
  return checked(PyObject_GetAttr(object.ptr(), name));
}

// None where the object has none of that name, without raising in between.
inline py::object attribute_or_none(py::handle object, PyObject* name) {
  static PyObject* const getattr = imported("builtins", "getattr");
  PyObject* const values[] = {object.ptr(), name, Py_None};
  return checked(PyObject_Vectorcall(getattr, values, 3, nullptr));
}

inline void set_attribute(py::handle object, PyObject* name, py::handle value) {
  if (PyObject_SetAttr(object.ptr(), name, value.ptr()) != 0) throw py::error_already_set();
}

// --- functions without pybind11's call, which costs as much as a small kernel ------------------------------------

using Body = py::object (*)(PyObject* const* arguments);
using FastMethod = PyObject* (*)(PyObject* self, PyObject* const* arguments, Py_ssize_t count);

inline PyCFunction as_method(
    FastMethod method) {  // what the C interface asks for, by way of a type GCC lets pass
  return reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(method));
}

// body(arguments) with its exceptions made Python's, if `count` is what it expects.
PyObject* run(Body body, Py_ssize_t expected, PyObject* const* arguments, Py_ssize_t count);

// Defines m.name(...), a function of `arity` positional arguments.
template <Body body, Py_ssize_t arity>
void define(py::module_& m, const char* name, const char* doc) {
  const FastMethod method = [](PyObject*, PyObject* const* arguments, Py_ssize_t count) {
    return run(body, arity, arguments, count);
  };
  static PyMethodDef definition{name, as_method(method), METH_FASTCALL, doc};
  m.add_object(name, checked(PyCFunction_NewEx(&definition, nullptr, m.attr("__name__").ptr())));
}

// Defines both hooks of `op`: m.<op>_eager_forward(ctx, <inputs>), of `count` inputs, and
// m.<op>_eager_backward(ctx, <gradient>). `inputs` and `gradient` are written as in a signature.
template <Body forward, Py_ssize_t count, Body backward>
void define_hooks(py::module_& m, const std::string& op, const std::string& inputs,
                  const std::string& gradient) {
  const auto doc = [](const std::string& name, const std::string& arguments) {
    return name + "(ctx: object, " + arguments + ") -> object\n\nHook of torch.autograd.Function.";
  };
  // Python keeps pointers to them.
  static const std::string names[] = {op + "_eager_forward", op + "_eager_backward"};
  static const std::string docs[] = {doc(names[0], inputs), doc(names[1], gradient)};
  define<forward, count + 1>(m, names[0].c_str(), docs[0].c_str());
  define<backward, 2>(m, names[1].c_str(), docs[1].c_str());
}

// --- tensors -------------------------------------------------------------------------------------------------

// A torch tensor or None, kept, with its view.
class Operand {
 public:
  explicit Operand(py::object tensor) : tensor_(std::move(tensor)) {
    view_of(tensor_, &view_, &owner_, dims_);
  }
  Operand(Operand&& other)
      : tensor_(std::move(other.tensor_)), owner_(std::move(other.owner_)), view_(other.view_) {
    std::copy(std::begin(other.dims_), std::end(other.dims_), dims_);
    if (view_.sizes == other.dims_) view_.sizes = dims_;  // where the source had none to point to
    if (view_.strides == other.dims_ + kMaxDims) view_.strides = dims_ + kMaxDims;
  }
  Operand& operator=(const Operand&) = delete;

  const py::object& tensor() const { return tensor_; }
  const TensorView& view() const { return view_; }

  // A fresh tensor of this one's device and dtype, or f32; sizes: `count` numbers.
  Operand new_empty(const int64_t* sizes, int count, bool f32 = false) const {
    static PyObject* const float32 = imported("torch", "float32");
    return new_of(sizes, count, f32 ? float32 : nullptr);
  }

  // The same of int32.
  Operand new_int32(const int64_t* sizes, int count) const {
    static PyObject* const int32 = imported("torch", "int32");
    return new_of(sizes, count, int32);
  }

  // A fresh tensor of this one's shape, dtype and device; None for None.
  Operand empty_like() const {
    static PyObject* const function = imported("torch", "empty_like");
    if (!view_) return Operand(py::none());
    if (view_.is_contiguous()) return Operand(checked(PyObject_CallOneArg(function, tensor_.ptr())));
    return new_empty(view_.sizes, view_.ndim);
  }

 private:
  Operand new_of(const int64_t* sizes, int count, PyObject* dtype) const {
    static PyObject* const name = interned("new_empty");
    static PyObject* const keywords = py::make_tuple("dtype").release().ptr();
    // Sizes one by one parse in half the time of a tuple, which none and many need.
    const bool one_by_one = count > 0 && count <= kMaxDims;
    py::object numbers[kMaxDims];
    PyObject* values[kMaxDims + 2] = {tensor_.ptr()};
    size_t filled = 1;
    if (!one_by_one) values[filled++] = (numbers[0] = tuple_of(sizes, count)).ptr();
    for (int i = 0; one_by_one && i < count; ++i) values[filled++] = (numbers[i] = py::int_(sizes[i])).ptr();
    values[filled] = dtype;
    return Operand(checked(PyObject_VectorcallMethod(name, values, filled, dtype ? keywords : nullptr)));
  }

  static py::object tuple_of(const int64_t* sizes, int count) {
    py::tuple numbers(static_cast<size_t>(count));
    for (int i = 0; i < count; ++i) numbers[static_cast<size_t>(i)] = py::int_(sizes[i]);
    return numbers;
  }

  py::object tensor_, owner_;
  TensorView view_;
  int64_t dims_[2 * kMaxDims] = {};
};

inline Operand operand(py::handle tensor) { return Operand(py::reinterpret_borrow<py::object>(tensor)); }

inline bool rows_at_one_stride(const TensorView& view) {
  if (view.ndim < 1 || (view.size(-1) > 1 && view.stride(-1) != 1)) return false;
  int64_t expected = -1;
  for (int d = view.ndim - 2; d >= 0; --d) {
    if (view.size(d) == 1) continue;
    if (expected >= 0 && view.stride(d) != expected) return false;
    expected = view.stride(d) * view.size(d);
  }
  return true;
}

inline Operand made_contiguous(py::handle tensor) {
  static PyObject* const name = interned("contiguous");
  return Operand(checked(PyObject_VectorcallMethod(name, &tensor.ptr(), 1, nullptr)));
}

inline Operand contiguous(py::handle tensor) {
  Operand kept = operand(tensor);
  return kept.view().is_contiguous() ? std::move(kept) : made_contiguous(tensor);
}

// The tensor, copied where its last dimension has another stride than 1.
inline Operand last_contiguous(py::handle tensor) {
  Operand kept = operand(tensor);
  const TensorView& view = kept.view();
  const bool fits = view.ndim == 0 || view.size(-1) <= 1 || view.stride(-1) == 1;
  return fits ? std::move(kept) : made_contiguous(tensor);
}

// The tensor (..., C) or None, copied where its rows do not lie at one stride, as kernels want them.
inline Operand as_rows(py::handle tensor) {
  Operand kept = operand(tensor);
  return !kept.view() || rows_at_one_stride(kept.view()) ? std::move(kept) : made_contiguous(tensor);
}

// Whether a torch tensor may be read in place, row by row: the plain case that native paths take, where Python
// would spend more on asking than a small kernel on working. Other frameworks and layouts are Python's.
inline bool is_plain(py::handle tensor) {
  const dlpack::ExchangeApi* api = traits_of(Py_TYPE(tensor.ptr())).api;
  dlpack::Tensor fields;
  if (!api) return false;
  if (api->tensor_from_py_object(tensor.ptr(), &fields) != 0) {  // sparse, say: Python says why
    PyErr_Clear();
    return false;
  }
  TensorView view;
  view_dlpack(fields, false, tensor, &view);
  return rows_at_one_stride(view);
}

// Whether torch would record an operation on one of these tensors, or None.
template <class... Tensors>
bool wants_grad(Tensors... tensors) {
  static PyObject* const name = interned("requires_grad");
  static PyObject* const is_grad_enabled = imported("torch", "is_grad_enabled");
  const auto requires_grad = [](PyObject* tensor) {
    return tensor != Py_None && attribute_or_none(tensor, name).ptr() == Py_True;
  };
  return (requires_grad(tensors) || ...) && checked(PyObject_CallNoArgs(is_grad_enabled)).ptr() == Py_True;
}

// --- ctx -----------------------------------------------------------------------------------------------------

// As ctx.save_for_backward does, a Python function.
template <class... Tensors>
void save_for_backward(py::handle ctx, const Tensors&... tensors) {
  static PyObject* const name = interned("to_save");
  set_attribute(ctx, name, checked(PyTuple_Pack(sizeof...(Tensors), tensors.ptr()...)));
}

// As ctx.mark_non_differentiable and ctx.set_materialize_grads(False) do: gradients may come as None.
template <class... Tensors>
void mark_non_differentiable(py::handle ctx, const Tensors&... tensors) {
  static PyObject* const name = interned("non_differentiable");
  static PyObject* const materialize = interned("materialize_grads");
  set_attribute(ctx, name, checked(PyTuple_Pack(sizeof...(Tensors), tensors.ptr()...)));
  set_attribute(ctx, materialize, py::bool_(false));
}

inline py::tuple saved_tensors(py::handle ctx) {
  static PyObject* const name = interned("saved_tensors");
  return py::tuple(attribute(ctx, name));
}

// What a hook keeps besides tensors.
inline PyObject* options_name() {
  static PyObject* const name = interned("options");
  return name;
}

}  // namespace gptcore::bindings
