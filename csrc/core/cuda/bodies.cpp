#include "core/cuda/bodies.h"

namespace gptcore::cuda {
namespace {

const DeviceBodies*& first() {
  static const DeviceBodies* list = nullptr;  // other files register before main
  return list;
}

DeviceLink link{nullptr, nullptr};

}  // namespace

const DeviceBodies* all_bodies() { return first(); }

RegisteredBodies::RegisteredBodies(const char* name, const void* bodies)
    : DeviceBodies{name, bodies, first()} {
  first() = this;
}

DeviceCall current_call() { return link.call ? link.call() : DeviceCall{}; }
DeviceMemory caller_memory() { return link.memory ? link.memory() : DeviceMemory{nullptr, nullptr}; }
void connect(const DeviceLink& from) { link = from; }

}  // namespace gptcore::cuda
