// The only place that knows how a Python tensor becomes a TensorView:
//
//   torch (and whoever else offers it)   the C exchange API of the type, about 0.05 us a tensor
//   NumPy                                the buffer protocol; ml_dtypes bf16 arrays by a view as 16-bit integers
//   CuPy, older torch, odd NumPy arrays  `__dlpack__`, versioned first (it carries the read-only flag)
//   None                                 an undefined view, for optional arguments
//
// Views are borrowed for the length of the call. What has no memory to look at (FakeTensor, meta, sparse) and
// what kernels cannot read (complex) is refused with a sentence.
#pragma once

#include <pybind11/pybind11.h>

#include <cstring>
#include <deque>
#include <string>
#include <vector>

#include "bindings/dlpack.h"
#include "core/check.h"
#include "core/step_number.h"
#include "core/tensor_view.h"

namespace gptcore {

// A Python sequence of tensors, for ops that take many per call.
struct TensorList {
  std::vector<TensorView> views;
  size_t size() const { return views.size(); }
  const TensorView& operator[](size_t i) const { return views[i]; }
};

}  // namespace gptcore

namespace gptcore::bindings {

namespace py = pybind11;

constexpr int kMaxDims = 8;

// What is known of a Python type; looked up once per type.
struct TypeTraits {
  const dlpack::ExchangeApi* api = nullptr;  // null where it has none
  bool is_numpy = false;
};
TypeTraits traits_of(PyTypeObject* type);

// Fills `view` from a NumPy array whose elements and strides the buffer protocol can tell, else returns false.
// `dims` is room for sizes and strides that the source does not store itself.
bool view_numpy(py::handle source, TensorView* view, int64_t* dims);

// Whether elements lie elsewhere than at multiples of their size, where kernels cannot address them.
inline bool is_misaligned(const TensorView& view) {
  return reinterpret_cast<uintptr_t>(view.data) % static_cast<uintptr_t>(size_of(view.dtype)) != 0;
}

// Fills `view` from an aligned copy of a NumPy array, read-only since what is written there would be lost.
void view_copy(py::handle source, TensorView* view, py::object* owner, int64_t* dims);

// Fills `view` through `__dlpack__`. `owner` keeps the memory's description alive.
void view_capsule(py::handle source, TensorView* view, py::object* owner);

// Fills `view` from a DLPack tensor, refusing what kernels cannot read.
void view_dlpack(const dlpack::Tensor& tensor, bool readonly, py::handle source, TensorView* view);

// Where `view` lies on a GPU: loads the kernels for it, once, and notes the device, the caller's current stream
// there and who gives memory (`api`, or null), for device_call().
void note_device(const TensorView& view, const dlpack::ExchangeApi* api);

// Turns the Python error that an exchange API left into a TypeError that names the type.
[[noreturn]] void refuse(py::handle source);

inline void view_of(py::handle source, TensorView* view, py::object* owner, int64_t* dims) {
  if (source.is_none()) return;
  const TypeTraits traits = traits_of(Py_TYPE(source.ptr()));
  if (traits.api) {
    dlpack::Tensor tensor;
    if (traits.api->tensor_from_py_object(source.ptr(), &tensor) != 0) refuse(source);
    view_dlpack(tensor, false, source, view);
    if (view->device != Device::cpu) note_device(*view, traits.api);
    return;
  }
  if (!traits.is_numpy || !view_numpy(source, view, dims)) view_capsule(source, view, owner);
  if (view->device != Device::cpu) note_device(*view, nullptr);
  if (traits.is_numpy && is_misaligned(*view)) view_copy(source, view, owner, dims);
}

}  // namespace gptcore::bindings

namespace pybind11::detail {

template <>
struct type_caster<gptcore::TensorView> {
  PYBIND11_TYPE_CASTER(gptcore::TensorView, const_name("Tensor | None"));

  bool load(handle source, bool) {
    gptcore::bindings::view_of(source, &value, &owner_, dims_);
    return true;
  }

 private:
  object owner_;
  int64_t dims_[2 * gptcore::bindings::kMaxDims];
};

// A tensor of one element, or whatever Python makes a float of. What the processor can read it reads now.
template <>
struct type_caster<gptcore::StepNumber> {
  PYBIND11_TYPE_CASTER(gptcore::StepNumber, const_name("float | Tensor"));

  bool load(handle source, bool) {
    if (source.is_none()) return false;
    if (!PyFloat_Check(source.ptr()) && !PyLong_Check(source.ptr())) {
      const auto traits = gptcore::bindings::traits_of(Py_TYPE(source.ptr()));
      if (traits.api || traits.is_numpy || hasattr(source, "__dlpack__")) {
        gptcore::bindings::view_of(source, &value.tensor, &owner_, dims_);
        if (!gptcore::is_known(value) || value.tensor.numel() != 1) return true;
      }
    }
    value.value = PyFloat_AsDouble(source.ptr());
    if (value.value != -1.0 || !PyErr_Occurred()) return true;
    PyErr_Clear();
    return false;
  }

 private:
  object owner_;
  int64_t dims_[2 * gptcore::bindings::kMaxDims];
};

template <>
struct type_caster<gptcore::TensorList> {
  PYBIND11_TYPE_CASTER(gptcore::TensorList, const_name("list[Tensor]"));

  bool load(handle source, bool) {
    if (!isinstance<sequence>(source)) return false;
    const auto items = reinterpret_borrow<sequence>(source);
    const size_t count = items.size();
    value.views.resize(count);
    for (size_t i = 0; i < count; ++i) {
      Item& item = items_.emplace_back();
      item.source = items[i];
      gptcore::bindings::view_of(item.source, &value.views[i], &item.owner, item.dims);
    }
    return true;
  }

 private:
  struct Item {
    object source, owner;
    int64_t dims[2 * gptcore::bindings::kMaxDims];
  };
  std::deque<Item> items_;  // never moves its elements: views point into them
};

}  // namespace pybind11::detail
