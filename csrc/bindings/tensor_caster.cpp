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

// ml_dtypes arrays speak neither DLPack nor the buffer protocol; their array interface gives raw two-byte
// items.
bool view_ml_dtypes(py::handle source, TensorView* view, int64_t* dims) {
  if (!py::hasattr(source, "__array_interface__") || !py::hasattr(source, "dtype")) return false;
  const py::object dtype = source.attr("dtype");
  if (!py::hasattr(dtype, "name") || py::cast<std::string>(dtype.attr("name")) != "bfloat16") return false;
  const py::dict interface = source.attr("__array_interface__");
  const py::tuple shape = interface["shape"];
  if (shape.size() > kMaxDims) throw ValueError("gptcore: got an array of more than 8 dimensions");
  const py::tuple data = interface["data"];
  view->data = reinterpret_cast<void*>(py::cast<uintptr_t>(data[0]));
  view->readonly = py::cast<bool>(data[1]);
  view->dtype = DType::bf16;
  view->ndim = static_cast<int32_t>(shape.size());
  view->sizes = dims;
  for (int i = 0; i < view->ndim; ++i) dims[i] = py::cast<int64_t>(shape[i]);
  const py::object strides = interface.contains("strides") ? py::object(interface["strides"]) : py::none();
  if (!strides.is_none()) {
    for (int i = 0; i < view->ndim; ++i) dims[kMaxDims + i] = py::cast<int64_t>(strides[py::int_(i)]) / 2;
    view->strides = dims + kMaxDims;
  }
  view->defined = true;
  return true;
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

const dlpack::ExchangeApi* exchange_api_of(PyTypeObject* type) {
  // Few types ever come by; a linear search over them is cheaper than a hash. The types are kept alive so
  // that an address cannot come back as another type. The GIL guards the table.
  struct Entry {
    PyTypeObject* type;
    const dlpack::ExchangeApi* api;
  };
  static Entry entries[16];
  static int count = 0;
  for (int i = 0; i < count; ++i) {
    if (entries[i].type == type) return entries[i].api;
  }
  const dlpack::ExchangeApi* api = nullptr;
  const py::handle handle(reinterpret_cast<PyObject*>(type));
  if (py::hasattr(handle, "__dlpack_c_exchange_api__")) {
    const py::object capsule = handle.attr("__dlpack_c_exchange_api__");
    api = static_cast<const dlpack::ExchangeApi*>(PyCapsule_GetPointer(capsule.ptr(), "dlpack_exchange_api"));
    if (!api) PyErr_Clear();
    if (api && (api->header.version.major != 1 || !api->tensor_from_py_object)) api = nullptr;
  }
  if (count < 16) {
    Py_INCREF(type);
    entries[count++] = {type, api};
  }
  return api;
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

void view_slowly(py::handle source, TensorView* view, py::object* owner, int64_t* dims) {
  if (view_ml_dtypes(source, view, dims)) return;
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

}  // namespace gptcore::bindings
