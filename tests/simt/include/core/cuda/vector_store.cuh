// csrc/core/cuda/vector_store.cuh for the processor.
#pragma once

#include <cuda_runtime.h>

namespace gptcore::cuda {

inline void store_vector(void* p, uint4 x) { *static_cast<uint4*>(p) = x; }
inline void store_vector(void* p, uint2 x) { *static_cast<uint2*>(p) = x; }

}  // namespace gptcore::cuda
