// csrc/core/cuda/approximate.cuh for the processor: the exact functions, with subnormal results flushed as there.
#pragma once

#include <cuda_runtime.h>

namespace gptcore::cuda {

inline float simt_flush(float x) { return std::fabs(x) < 0x1p-126f ? std::copysign(0.0f, x) : x; }
inline float exp2_approximate(float x) { return simt_flush(std::exp2(x)); }
inline float log2_approximate(float x) { return std::log2(simt_flush(x)); }
inline float reciprocal_approximate(float x) { return simt_flush(1.0f / simt_flush(x)); }
inline float sqrt_approximate(float x) { return std::sqrt(x); }
inline float sqrt_flushed(float x) { return std::sqrt(simt_flush(x)); }
inline float tanh_approximate(float x) { return std::tanh(x); }

}  // namespace gptcore::cuda
