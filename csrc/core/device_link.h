// How kernels of another device come to the ops. The ops' checks, tables and bindings live in _C; _C_cuda holds
// nothing but bodies, and hands them over when it is loaded. To <op>.cpp CUDA is then one more entry of its table of
// bodies, and there is one set of checks, bindings and Python for all devices.
#pragma once

#include <cstdint>

#include "core/tensor_view.h"

namespace gptcore {

// One table's entry for the other device: null until its module is loaded, and for ops without a kernel there.
struct DeviceSlot {
  const char* name;  // of the bodies, such as "layer_norm_bodies"
  const void* bodies = nullptr;
  DeviceSlot* next;

  DeviceSlot(const char* name);
};

// What the other module says of its bodies.
struct DeviceBodies {
  const char* name;
  const void* bodies;
  const DeviceBodies* next;
};

// Where the call at hand runs: set from its tensors by whoever reads them from Python, before the kernel is called.
struct DeviceCall {
  int32_t index = 0;       // of the device
  void* stream = nullptr;  // the caller's current one
  // The caller's framework, which gives scratch memory in the order of that stream; null: it cannot.
  void* allocator = nullptr;
};
DeviceCall& device_call();  // of this thread

// Scratch memory by the allocator of device_call(): null where there is none or it refuses. `handle` gives it back.
struct DeviceMemory {
  void* (*allocate)(int64_t bytes, void** handle);
  void (*release)(void* handle);
};
const DeviceMemory& device_memory();
void set_device_memory(const DeviceMemory& memory);

// What the other module is given, and what it gives.
struct DeviceLink {
  DeviceCall& (*call)();
  const DeviceMemory& (*memory)();
};
struct DeviceModule {
  const char* layout;  // GPTCORE_LAYOUT of layout.cmake: that of the structs in which the modules speak
  Device device;
  const DeviceBodies* bodies;
  void (*connect)(const DeviceLink& link);
};

// Puts bodies of a module of this layout into the slots of their names. `device` is where their tensors live: cuda, or
// cpu for bodies that stand in for an instruction set.
void attach_bodies(Device device, const DeviceBodies* first);

// Whether bodies for tensors on this device are attached.
bool has_bodies(Device device);

}  // namespace gptcore
