// Scratch memory on the device for one launcher: from the caller's framework where it gives some, else from CUDA's own
// pool, both in the order of the caller's stream, so that it may be given back as soon as the kernels are started.
#pragma once

#include <cstdint>

namespace gptcore::cuda {

class DeviceScratch {
 public:
  explicit DeviceScratch(int64_t bytes);  // 256-byte aligned, contents undefined
  ~DeviceScratch();
  DeviceScratch(const DeviceScratch&) = delete;
  DeviceScratch& operator=(const DeviceScratch&) = delete;

  template <class T>
  T* as() const {
    return static_cast<T*>(data_);
  }

 private:
  void* data_ = nullptr;
  void* handle_ = nullptr;  // the framework's; null where the memory is CUDA's own
};

}  // namespace gptcore::cuda
