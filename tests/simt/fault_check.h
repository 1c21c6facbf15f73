// Kernels with a fault each, which the emulation must see.
#pragma once

#include <pybind11/pybind11.h>

namespace gptcore::cuda {

void define_fault_check(pybind11::module_& m);

}  // namespace gptcore::cuda
