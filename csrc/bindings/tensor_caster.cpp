#include "bindings/tensor_caster.h"

namespace gptcore::bindings {
namespace {

std::string type_name(py::handle source) { return Py_TYPE(source.ptr())->tp_name; }

DType dtype_of(const dlpack::DataType& type, py::handle source) {
  if (type.code == dlpack::kComplex) {
    throw TypeError("gptcore: got a complex tensor of type " + type_name(source) + ", expected a real one");
  }
  if (type.lanes != 1)
    throw TypeError("gptcore: got a tensor with vector elements, expected scalar elements");
  switch (type.code) {
    case dlpack::kFloat:
      return type.bits == 32   ? DType::f32
             : type.bits == 16 ? DType::f16
             : type.bits == 64 ? DType::f64
                               : DType::other;
    case dlpack::kBfloat:
      return type.bits == 16 ? DType::bf16 : DType::other;
    case dlpack::kInt:
      return type.bits == 64   ? DType::i64
             : type.bits == 32 ? DType::i32
             : type.bits == 16 ? DType::i16
             : type.bits == 8  ? DType::i8
                               : DType::other;
    case dlpack::kUInt:
      return type.bits == 8 ? DType::u8 : DType::other;
    case dlpack::kBool:
      return DType::boolean;
    default:
      return DType::other;
  }
}

// The type of elements that the buffer protocol describes as `format`; other for what DLPack shall judge, which is
// byte-swapped numbers, records and all that kernels do not read.
DType dtype_of_format(const char* format, Py_ssize_t bytes) {
  if (!format || format[0] == '\0' || format[1] != '\0') return DType::other;
  switch (format[0]) {
    case 'f':
      return DType::f32;
    case 'e':
      return DType::f16;
    case 'd':
      return DType::f64;
    case 'b':
    case 'h':
    case 'i':
    case 'l':
    case 'q':
      return bytes == 8 ? DType::i64 : bytes == 4 ? DType::i32 : bytes == 2 ? DType::i16 : DType::i8;
    case 'B':
      return DType::u8;
    case '?':
      return DType::boolean;
    default:
      return DType::other;
  }
}

// Fills `view` by the buffer protocol; `dtype` is that of the elements where the buffer cannot tell it. The buffer is
// let go at once: the caller holds the array during the call, and sizes and strides are copied.
bool view_buffer(PyObject* array, TensorView* view, int64_t* dims, DType dtype) {
  Py_buffer buffer;
  if (PyObject_GetBuffer(array, &buffer, PyBUF_RECORDS_RO) != 0) {
    PyErr_Clear();
    return false;
  }
  if (dtype == DType::other) dtype = dtype_of_format(buffer.format, buffer.itemsize);
  bool readable = dtype != DType::other && buffer.ndim <= kMaxDims;
  for (int d = 0; readable && d < buffer.ndim; ++d) {
    dims[d] = buffer.shape[d];
    dims[kMaxDims + d] = buffer.strides[d] / buffer.itemsize;
    readable = buffer.strides[d] % buffer.itemsize == 0;
  }
  if (readable) {
    view->data = buffer.buf;
    view->dtype = dtype;
    view->readonly = buffer.readonly;
    view->ndim = buffer.ndim;
    view->sizes = dims;
    view->strides = dims + kMaxDims;
    view->defined = true;
  }
  PyBuffer_Release(&buffer);
  return readable;
}

// A view of the array's bits as 16-bit integers, which the buffer protocol knows.
py::object as_integers(py::handle source) {
  static PyObject* const uint16 = py::module_::import("numpy").attr("dtype")("uint16").release().ptr();
  return source.attr("view")(py::handle(uint16));
}

py::object capsule_of(py::handle source) {
  // Autograd's tensors refuse to export; the view is read under no-grad, so the detached one serves.
  py::object exporter = py::reinterpret_borrow<py::object>(source);
  if (py::hasattr(source, "detach")) exporter = source.attr("detach")();
  try {
    return exporter.attr("__dlpack__")(py::arg("max_version") = py::make_tuple(1, 3));
  } catch (py::error_already_set& error) {
    if (!error.matches(PyExc_TypeError)) throw;  // an exporter older than the keyword
  }
  return exporter.attr("__dlpack__")();
}

}  // namespace

TypeTraits traits_of(PyTypeObject* type) {
  // Few types ever come by; a linear search over them is cheaper than a hash. The types are kept alive so
  // that an address cannot come back as another type. The GIL guards the table.
  struct Entry {
    PyTypeObject* type;
    TypeTraits traits;
  };
  static Entry entries[16];
  static int count = 0;
  for (int i = 0; i < count; ++i) {
    if (entries[i].type == type) return entries[i].traits;
  }
  TypeTraits traits;
  const py::handle handle(reinterpret_cast<PyObject*>(type));
  if (py::hasattr(handle, "__dlpack_c_exchange_api__")) {
    const py::object capsule = handle.attr("__dlpack_c_exchange_api__");
    const auto* api =
        static_cast<const dlpack::ExchangeApi*>(PyCapsule_GetPointer(capsule.ptr(), "dlpack_exchange_api"));
    if (!api) PyErr_Clear();
    if (api && api->header.version.major == 1 && api->tensor_from_py_object) traits.api = api;
  }
  for (const py::handle base : py::reinterpret_borrow<py::tuple>(type->tp_mro)) {
    const char* name = reinterpret_cast<PyTypeObject*>(base.ptr())->tp_name;
    traits.is_numpy = traits.is_numpy || std::strcmp(name, "numpy.ndarray") == 0;
  }
  if (count < 16) {
    Py_INCREF(type);
    entries[count++] = {type, traits};
  }
  return traits;
}

void refuse(py::handle source) {
  std::string why;
  if (PyErr_Occurred()) {
    py::error_already_set error;
    why = py::str(error.value());
  }
  throw TypeError("gptcore: cannot read a tensor of type " + type_name(source) +
                  (why.empty() ? "" : " (" + why.substr(0, why.find('\n')) + ")") +
                  "; expected a dense CPU or CUDA tensor with memory of its own");
}

void view_dlpack(const dlpack::Tensor& tensor, bool readonly, py::handle source, TensorView* view) {
  view->dtype = dtype_of(tensor.dtype, source);
  switch (tensor.device.type) {
    case dlpack::kCpu:
    case dlpack::kCudaHost:
      view->device = Device::cpu;
      break;
    case dlpack::kCuda:
    case dlpack::kCudaManaged:
      view->device = Device::cuda;
      break;
    default:
      throw ValueError("gptcore: got a tensor on an unknown device, expected the CPU or CUDA");
  }
  view->data = tensor.data ? static_cast<char*>(tensor.data) + tensor.byte_offset : nullptr;
  view->device_index = tensor.device.id;
  view->ndim = tensor.ndim;
  view->sizes = tensor.shape;
  view->strides = tensor.strides;
  view->readonly = readonly;
  view->defined = true;
  if (!view->data && view->numel() > 0) {
    throw TypeError("gptcore: got a tensor without data (type " + type_name(source) +
                    "; a fake or meta tensor), expected one with memory");
  }
}

bool view_numpy(py::handle source, TensorView* view, int64_t* dims) {
  static PyObject* const attribute = PyUnicode_InternFromString("dtype");
  static PyObject* bfloat16 = nullptr;  // ml_dtypes', once it has come by: names take microseconds
  const py::object dtype = py::reinterpret_steal<py::object>(PyObject_GetAttr(source.ptr(), attribute));
  if (!dtype) throw py::error_already_set();
  if (dtype.ptr() == bfloat16) return view_buffer(as_integers(source).ptr(), view, dims, DType::bf16);
  if (view_buffer(source.ptr(), view, dims, DType::other)) return true;
  if (py::cast<std::string>(dtype.attr("name")) != "bfloat16") return false;
  Py_XDECREF(bfloat16);
  bfloat16 = dtype.inc_ref().ptr();
  return view_buffer(as_integers(source).ptr(), view, dims, DType::bf16);
}

void view_capsule(py::handle source, TensorView* view, py::object* owner) {
  if (!py::hasattr(source, "__dlpack__")) {
    throw TypeError("gptcore: got " + type_name(source) +
                    ", expected a torch tensor, a NumPy or CuPy array, or None");
  }
  try {
    *owner = capsule_of(source);
  } catch (py::error_already_set& error) {
    error.restore();
    refuse(source);
  }
  if (void* versioned = PyCapsule_IsValid(owner->ptr(), "dltensor_versioned")
                            ? PyCapsule_GetPointer(owner->ptr(), "dltensor_versioned")
                            : nullptr) {
    const auto& managed = *static_cast<dlpack::ManagedTensorVersioned*>(versioned);
    view_dlpack(managed.tensor, managed.flags & dlpack::kFlagReadOnly, source, view);
    return;
  }
  void* plain = PyCapsule_GetPointer(owner->ptr(), "dltensor");
  if (!plain) throw py::error_already_set();
  view_dlpack(static_cast<dlpack::ManagedTensor*>(plain)->tensor, false, source, view);
}

void view_copy(py::handle source, TensorView* view, py::object* owner, int64_t* dims) {
  const py::object copy = source.attr("copy")();
  if (view_numpy(copy, view, dims)) {
    *owner = copy;
  } else {
    view_capsule(copy, view, owner);
  }
  view->readonly = true;
}

}  // namespace gptcore::bindings
