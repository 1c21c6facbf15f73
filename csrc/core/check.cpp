#include "core/check.h"

namespace gptcore {

const char* name_of(DType dtype) {
  switch (dtype) {
    case DType::f32:
      return "float32";
    case DType::bf16:
      return "bfloat16";
    case DType::f16:
      return "float16";
    case DType::f64:
      return "float64";
    case DType::i8:
      return "int8";
    case DType::u8:
      return "uint8";
    case DType::i16:
      return "int16";
    case DType::i32:
      return "int32";
    case DType::i64:
      return "int64";
    case DType::boolean:
      return "bool";
    default:
      return "an unsupported dtype";
  }
}

namespace {

std::string shape_text(const int64_t* sizes, int ndim) {
  std::string text = "(";
  for (int d = 0; d < ndim; ++d) {
    if (d) text += ", ";
    text += sizes[d] < 0 ? std::string("any") : std::to_string(sizes[d]);
  }
  return text + (ndim == 1 ? ",)" : ")");
}

std::string place_text(Device device, int32_t index) {
  return device == Device::cpu ? "the CPU" : "cuda:" + std::to_string(index);
}

}  // namespace

std::string describe(const TensorView& tensor) {
  if (!tensor.defined) return "None";
  return std::string(name_of(tensor.dtype)) + " " + shape_text(tensor.sizes, tensor.ndim);
}

void Checker::fail(const char* argument, const std::string& got, const std::string& expected) const {
  throw ValueError(std::string(op_) + ": argument '" + argument + "': got " + got + ", expected " + expected);
}

void Checker::fail_type(const char* argument, const std::string& got, const std::string& expected) const {
  throw TypeError(std::string(op_) + ": argument '" + argument + "': got " + got + ", expected " + expected);
}

void Checker::defined(const TensorView& tensor, const char* argument) const {
  if (!tensor.defined) fail_type(argument, "None", "a tensor");
}

void Checker::on_device(const TensorView& tensor, const char* argument) const {
  if (!seen_) {
    if (tensor.device != Device::cpu && !(slot_ && slot_->bodies)) {
      fail(argument, "a tensor on " + place_text(tensor.device, tensor.device_index),
           "a tensor on the CPU: this operation has no kernel for another device here");
    }
    seen_ = true, device_ = tensor.device, device_index_ = tensor.device_index;
    return;
  }
  if (tensor.device != device_ || (device_ != Device::cpu && tensor.device_index != device_index_)) {
    fail(argument, "a tensor on " + place_text(tensor.device, tensor.device_index),
         "one on " + place_text(device_, device_index_) + " like the arguments before it");
  }
}

void Checker::dtype(const TensorView& tensor, const char* argument,
                    std::initializer_list<DType> allowed) const {
  std::string names;
  for (DType candidate : allowed) {
    if (tensor.dtype == candidate) return;
    names += (names.empty() ? "" : " or ") + std::string(name_of(candidate));
  }
  fail_type(argument, name_of(tensor.dtype), names);
}

void Checker::ndim(const TensorView& tensor, const char* argument, int expected) const {
  if (tensor.ndim != expected) {
    fail(argument, shape_text(tensor.sizes, tensor.ndim), std::to_string(expected) + " dimensions");
  }
}

void Checker::shape(const TensorView& tensor, const char* argument,
                    std::initializer_list<int64_t> expected) const {
  bool same = tensor.ndim == static_cast<int>(expected.size());
  for (int d = 0; same && d < tensor.ndim; ++d) {
    const int64_t want = expected.begin()[d];
    same = want < 0 || tensor.sizes[d] == want;
  }
  if (!same) {
    fail(argument, "shape " + shape_text(tensor.sizes, tensor.ndim),
         "shape " + shape_text(expected.begin(), static_cast<int>(expected.size())));
  }
}

void Checker::same_shape(const TensorView& tensor, const char* argument, const TensorView& like,
                         const char* like_name) const {
  bool same = tensor.ndim == like.ndim;
  for (int d = 0; same && d < tensor.ndim; ++d) same = tensor.sizes[d] == like.sizes[d];
  if (!same) {
    fail(argument, "shape " + shape_text(tensor.sizes, tensor.ndim),
         std::string("the shape of '") + like_name + "', " + shape_text(like.sizes, like.ndim));
  }
}

void Checker::contiguous(const TensorView& tensor, const char* argument) const {
  if (!tensor.is_contiguous())
    fail(argument, "a tensor with gaps or permuted dimensions", "a contiguous one");
}

void Checker::last_contiguous(const TensorView& tensor, const char* argument) const {
  if (tensor.ndim > 0 && tensor.size(-1) > 1 && tensor.stride(-1) != 1 && tensor.numel() > 0) {
    fail(argument, "stride " + std::to_string(tensor.stride(-1)) + " in the last dimension", "stride 1");
  }
}

void Checker::writable(const TensorView& tensor, const char* argument) const {
  if (tensor.readonly) fail(argument, "a read-only array", "a writable one");
}

void Checker::item(const std::vector<TensorView>& list, const char* name, size_t i, const TensorView& like,
                   std::initializer_list<DType> allowed, bool written) const {
  const TensorView& tensor = list[i];
  bool fine = tensor.defined && seen_ && tensor.device == device_ && tensor.device_index == device_index_ &&
              tensor.ndim == like.ndim;
  for (int d = 0; fine && d < like.ndim; ++d) fine = tensor.sizes[d] == like.sizes[d];
  bool type = false;
  for (DType candidate : allowed) type = type || tensor.dtype == candidate;
  if (fine && type && tensor.is_contiguous() && !(written && tensor.readonly)) return;
  const std::string full = std::string(name) + "[" + std::to_string(i) + "]";
  input(tensor, full.c_str(), allowed);
  same_shape(tensor, full.c_str(), like, "params");
  contiguous(tensor, full.c_str());
  writable(tensor, full.c_str());
}

void Checker::length(size_t length, const char* name, size_t expected) const {
  if (length != expected) {
    fail(name, std::to_string(length) + " entries", std::to_string(expected) + ", one per parameter");
  }
}

void Checker::number(bool condition, const char* name, double value, const char* expected) const {
  if (!condition) fail(name, std::to_string(value), expected);
}

}  // namespace gptcore
