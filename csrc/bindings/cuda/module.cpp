// _C_cuda: what the CUDA build offers to Python.
#include <pybind11/pybind11.h>

#include <string>

#include "core/cuda/bodies.h"
#include "core/cuda/device.h"

namespace py = pybind11;

PYBIND11_MODULE(_C_cuda, m) {
  m.doc() = "gptcore's CUDA half; loads without a driver and then reports no device";
  m.def(
      "devices",
      [] {
        const char* reason = "";
        const int count = gptcore::cuda::device_count(&reason);
        py::list devices;
        for (int i = 0; i < count; ++i) {
          gptcore::cuda::DeviceInfo info;
          if (!gptcore::cuda::device_info(i, &info)) continue;
          py::dict entry;
          entry["index"] = i;
          entry["name"] = std::string(info.name);
          entry["compute_capability"] = std::to_string(info.major) + "." + std::to_string(info.minor);
          entry["multiprocessors"] = info.multiprocessors;
          entry["memory_bytes"] = info.memory_bytes;
          devices.append(entry);
        }
        return py::make_tuple(devices, std::string(reason));
      },
      "Visible devices as a list of dicts, and the CUDA runtime's reason where there are none.");
  static const gptcore::DeviceModule kernels{GPTCORE_LAYOUT, gptcore::Device::cuda,
                                             gptcore::cuda::all_bodies(), &gptcore::cuda::connect};
  m.def(
      "kernels", [] { return py::capsule(&kernels, "gptcore.kernels"); }, "What _C.attach_kernels() takes.");
  m.def("driver_version", &gptcore::cuda::driver_version,
        "The driver's CUDA version, 13000 for 13.0; 0 without one.");
  m.def("runtime_version", &gptcore::cuda::runtime_version, "The CUDA runtime this module was built with.");
}
