#include "core/cuda/scratch.h"

#include "core/cuda/launch.cuh"

namespace gptcore::cuda {

DeviceScratch::DeviceScratch(int64_t bytes) {
  if (bytes <= 0) return;
  const DeviceMemory memory = caller_memory();
  if (memory.allocate) data_ = memory.allocate(bytes, &handle_);
  if (data_) return;
  handle_ = nullptr;
  const OnDevice on_device;
  check_cuda(cudaMallocAsync(&data_, static_cast<size_t>(bytes), stream()), "scratch memory");
}

DeviceScratch::~DeviceScratch() {
  if (handle_) {
    caller_memory().release(handle_);
  } else if (data_) {
    cudaFreeAsync(data_, stream());
  }
}

}  // namespace gptcore::cuda
