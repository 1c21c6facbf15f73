// What tests/cuda/test_attention_backward_sm90.py asks of the launcher's arithmetic.
#pragma once

#include <pybind11/pybind11.h>

namespace gptcore::cuda {

void define_attention_backward_check(pybind11::module_& m);

}  // namespace gptcore::cuda
