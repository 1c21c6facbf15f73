#include "core/device_link.h"

#include <cstring>

namespace gptcore {
namespace {

DeviceSlot*& slots() {
  static DeviceSlot* first = nullptr;  // tables of other files register before main
  return first;
}

DeviceMemory memory_functions{nullptr, nullptr};
bool attached[2] = {false, false};

}  // namespace

DeviceSlot::DeviceSlot(const char* name) : name(name), next(slots()) { slots() = this; }

DeviceCall& device_call() {
  static thread_local DeviceCall call;
  return call;
}

const DeviceMemory& device_memory() { return memory_functions; }
void set_device_memory(const DeviceMemory& memory) { memory_functions = memory; }

void attach_bodies(Device device, const DeviceBodies* first) {
  for (const DeviceBodies* b = first; b; b = b->next) {
    for (DeviceSlot* slot = slots(); slot; slot = slot->next) {
      if (std::strcmp(slot->name, b->name) == 0) slot->bodies = b->bodies;
    }
  }
  attached[static_cast<int>(device)] = true;
}

bool has_bodies(Device device) { return attached[static_cast<int>(device)]; }

}  // namespace gptcore
