// Host-side plans of attention's kernels, for tests/cuda.
#pragma once

#include <pybind11/pybind11.h>

namespace gptcore::cuda {

void define_attention_check(pybind11::module_& m);

}  // namespace gptcore::cuda
