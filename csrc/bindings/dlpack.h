// DLPack's C structures, as far as gptcore reads them (dlpack 1.x, "dlpack.h"). Declared here so that the
// build needs no third-party header; the sizes are asserted.
#pragma once

#include <cstdint>

namespace gptcore::dlpack {

enum DeviceType : int32_t { kCpu = 1, kCuda = 2, kCudaHost = 3, kCudaManaged = 13 };
enum TypeCode : uint8_t { kInt = 0, kUInt = 1, kFloat = 2, kBfloat = 4, kComplex = 5, kBool = 6 };

struct Device {
  int32_t type;
  int32_t id;
};

struct DataType {
  uint8_t code;
  uint8_t bits;
  uint16_t lanes;
};

struct Tensor {
  void* data;
  Device device;
  int32_t ndim;
  DataType dtype;
  int64_t* shape;
  int64_t* strides;
  uint64_t byte_offset;
};
static_assert(sizeof(Tensor) == 48);

struct ManagedTensor {
  Tensor tensor;
  void* manager;
  void (*deleter)(ManagedTensor*);
};
static_assert(sizeof(ManagedTensor) == 64);

struct Version {
  uint32_t major;
  uint32_t minor;
};

struct ManagedTensorVersioned {
  Version version;
  void* manager;
  void (*deleter)(ManagedTensorVersioned*);
  uint64_t flags;
  Tensor tensor;
};
static_assert(sizeof(ManagedTensorVersioned) == 80);
constexpr uint64_t kFlagReadOnly = 1;

// The exchange API a tensor type offers as the capsule `__dlpack_c_exchange_api__` (dlpack 1.3): the non-owning
// view, and for tensors on a GPU the current stream and memory. The other slots keep their places.
struct ExchangeApiHeader {
  Version version;
  ExchangeApiHeader* previous;
};

using SetError = void (*)(void* context, const char* kind, const char* message);

struct ExchangeApi {
  ExchangeApiHeader header;
  int (*managed_tensor_allocator)(Tensor* prototype, ManagedTensorVersioned** out, void* context,
                                  SetError error);
  void* managed_tensor_from_py_object;
  void* managed_tensor_to_py_object;
  int (*tensor_from_py_object)(void* py_object, Tensor* out);
  int (*current_work_stream)(int32_t device_type, int32_t device_id, void** out);
};

}  // namespace gptcore::dlpack
