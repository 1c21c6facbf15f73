// What tests/cuda/test_mma.py drives: core/cuda/mma.cuh in the smallest kernel that uses all of it.
#pragma once

#include <pybind11/pybind11.h>

namespace gptcore::cuda {

void define_mma_check(pybind11::module_& m);

}  // namespace gptcore::cuda
