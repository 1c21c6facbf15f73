// What tests/cuda/test_hopper.py drives: core/cuda/hopper.cuh and wgmma.cuh in the smallest kernels that use them.
#pragma once

#include <pybind11/pybind11.h>

namespace gptcore::cuda {

void define_hopper_check(pybind11::module_& m);

}  // namespace gptcore::cuda
