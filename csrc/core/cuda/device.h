// What CUDA devices are here. Plain C++, so that bindings need no CUDA headers.
#pragma once

#include <cstddef>
#include <cstdint>

namespace gptcore::cuda {

struct DeviceInfo {
  char name[256];
  int major;
  int minor;
  int multiprocessors;
  size_t memory_bytes;
};

// Number of usable devices; 0 without a driver. `reason` (if not null) gets the runtime's words for a zero.
int device_count(const char** reason);

// False where `index` is no device.
bool device_info(int index, DeviceInfo* info);

// What launchers ask of the device of the call at hand; read once a device.
struct DeviceLimits {
  int arch;  // 90 for compute capability 9.0
  int multiprocessors;
  int64_t shared_bytes;  // that a block may have
};
const DeviceLimits& limits();

// Versions as CUDA counts them: 13000 is 13.0. 0 without a driver.
int driver_version();
int runtime_version();

}  // namespace gptcore::cuda
