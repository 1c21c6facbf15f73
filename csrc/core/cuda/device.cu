#include <cuda_runtime.h>

#include <cstring>
#include <mutex>
#include <stdexcept>
#include <string>

#include "core/cuda/bodies.h"
#include "core/cuda/device.h"

namespace gptcore::cuda {

int device_count(const char** reason) {
  int count = 0;
  const cudaError_t status = cudaGetDeviceCount(&count);
  if (status != cudaSuccess) {
    (void)cudaGetLastError();  // a sticky "no driver" would otherwise surface in the next call
    if (reason) *reason = cudaGetErrorString(status);
    return 0;
  }
  if (reason) *reason = count ? "" : "no device is visible";
  return count;
}

bool device_info(int index, DeviceInfo* info) {
  cudaDeviceProp properties;
  if (cudaGetDeviceProperties(&properties, index) != cudaSuccess) {
    (void)cudaGetLastError();
    return false;
  }
  std::strncpy(info->name, properties.name, sizeof(info->name) - 1);
  info->name[sizeof(info->name) - 1] = '\0';
  info->major = properties.major;
  info->minor = properties.minor;
  info->multiprocessors = properties.multiProcessorCount;
  info->memory_bytes = properties.totalGlobalMem;
  return true;
}

const DeviceLimits& limits() {
  constexpr int kMostDevices = 64;
  static DeviceLimits all[kMostDevices];
  static std::once_flag read[kMostDevices];
  const int index = current_call().index;
  if (index < 0 || index >= kMostDevices) throw std::runtime_error("gptcore: CUDA: a device index beyond 63");
  std::call_once(read[index], [index] {
    int major = 0, minor = 0, shared = 0;
    const cudaError_t failed[] = {
        cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, index),
        cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, index),
        cudaDeviceGetAttribute(&all[index].multiprocessors, cudaDevAttrMultiProcessorCount, index),
        cudaDeviceGetAttribute(&shared, cudaDevAttrMaxSharedMemoryPerBlockOptin, index)};
    for (const cudaError_t status : failed) {
      if (status != cudaSuccess)
        throw std::runtime_error(std::string("gptcore: CUDA: ") + cudaGetErrorString(status));
    }
    all[index].arch = 10 * major + minor;
    all[index].shared_bytes = shared;
  });
  return all[index];
}

int driver_version() {
  int version = 0;
  return cudaDriverGetVersion(&version) == cudaSuccess ? version : 0;
}

int runtime_version() {
  int version = 0;
  return cudaRuntimeGetVersion(&version) == cudaSuccess ? version : 0;
}

}  // namespace gptcore::cuda
