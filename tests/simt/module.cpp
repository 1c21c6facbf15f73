// _C_simt: CUDA's kernels on the processor, handed over as the instruction set "simt".
#include <pybind11/pybind11.h>

#include <cstdlib>
#include <new>

#include "attention_backward_check.h"
#include "attention_check.h"
#include "core/cuda/bodies.h"
#include "core/cuda/device.h"
#include "core/cuda/scratch.h"
#include "fault_check.h"
#include "hopper_check.h"
#include "mma_check.h"
#include "simt.h"

namespace py = pybind11;

namespace gptcore::cuda {

namespace {

// GPTCORE_SIMT_ARCH: 80 (the default), 90 or 100.
DeviceLimits simulated_limits() {
  const char* arch = std::getenv("GPTCORE_SIMT_ARCH");
  DeviceLimits l;
  l.arch = arch ? std::atoi(arch) : 80;
  l.multiprocessors = 3;  // so that persistent grids are smaller than their work
  l.shared_bytes = l.arch == 80 ? 163 << 10 : 227 << 10;
  return l;
}

}  // namespace

const DeviceLimits& limits() {
  static const DeviceLimits all = simulated_limits();
  return all;
}

DeviceScratch::DeviceScratch(int64_t bytes) {
  if (bytes <= 0) return;
  const auto size = static_cast<size_t>((bytes + 255) / 256 * 256);
  data_ = std::aligned_alloc(256, size);
  if (!data_) throw std::bad_alloc();
  __builtin_memset(data_, 0xff, size);  // NaN: a read of what nobody wrote shows
}
DeviceScratch::~DeviceScratch() { std::free(data_); }

}  // namespace gptcore::cuda

PYBIND11_MODULE(_C_simt, m) {
  static const gptcore::DeviceModule kernels{GPTCORE_LAYOUT, gptcore::Device::cpu,
                                             gptcore::cuda::all_bodies(), &gptcore::cuda::connect};
  m.def("kernels", [] { return py::capsule(&kernels, "gptcore.kernels"); });
  static const gptcore::DeviceModule of_other_sources{"another layout", kernels.device, kernels.bodies,
                                                      kernels.connect};
  m.def("kernels_of_other_sources", [] { return py::capsule(&of_other_sources, "gptcore.kernels"); });
  gptcore::cuda::define_fault_check(m);
  gptcore::cuda::define_mma_check(m);
  gptcore::cuda::define_hopper_check(m);
  gptcore::cuda::define_attention_check(m);
  gptcore::cuda::define_attention_backward_check(m);
  m.def("arch", [] { return gptcore::cuda::limits().arch; });
  m.def("last_kernel", [] { return simt::last_kernel; });
}
