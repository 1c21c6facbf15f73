// Where a call on a GPU runs: its stream, and scratch memory from the framework whose tensors it was given.
#include "bindings/tensor_caster.h"
#include "core/device_link.h"

namespace gptcore::bindings {
namespace {

// CuPy has no exchange interface; its current stream is asked for in Python.
void* stream_of_cupy() {
  const py::object cupy = py::module_::import("sys").attr("modules").attr("get")("cupy");
  if (cupy.is_none()) return nullptr;
  return reinterpret_cast<void*>(
      py::cast<uintptr_t>(cupy.attr("cuda").attr("get_current_stream")().attr("ptr")));
}

void ignore_error(void*, const char*, const char*) {}

// Bytes from the framework's own allocator, which orders reuse by the stream and knows of graph capture.
void* allocate(int64_t bytes, void** handle) {
  const DeviceCall& call = device_call();
  const auto* api = static_cast<const dlpack::ExchangeApi*>(call.allocator);
  if (!api || !api->managed_tensor_allocator) return nullptr;
  int64_t size = bytes, stride = 1;
  dlpack::Tensor prototype{};
  prototype.device = {dlpack::kCuda, call.index};
  prototype.ndim = 1;
  prototype.dtype = {dlpack::kUInt, 8, 1};
  prototype.shape = &size, prototype.strides = &stride;
  dlpack::ManagedTensorVersioned* memory = nullptr;
  if (api->managed_tensor_allocator(&prototype, &memory, nullptr, ignore_error) != 0) return nullptr;
  *handle = memory;
  return static_cast<char*>(memory->tensor.data) + memory->tensor.byte_offset;
}

void release(void* handle) {
  auto* memory = static_cast<dlpack::ManagedTensorVersioned*>(handle);
  if (memory->deleter) memory->deleter(memory);
}

}  // namespace

void note_device(const TensorView& view, const dlpack::ExchangeApi* api) {
  static bool asked = false;
  if (!asked) {
    asked = true;
    set_device_memory({allocate, release});
    py::module_::import("gptcore.backend").attr("attach_cuda")();
  }
  DeviceCall& call = device_call();
  call.index = view.device_index;
  call.allocator = const_cast<dlpack::ExchangeApi*>(api);
  if (!api || !api->current_work_stream) {
    call.stream = stream_of_cupy();
  } else if (api->current_work_stream(dlpack::kCuda, view.device_index, &call.stream) != 0) {
    refuse(py::none());
  }
}

}  // namespace gptcore::bindings
