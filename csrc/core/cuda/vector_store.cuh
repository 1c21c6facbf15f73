// Stores of 16 and 8 bytes at once. Of a struct or a float4 the compiler may make one for each element.
#pragma once

#include <cuda_runtime.h>

namespace gptcore::cuda {

__device__ __forceinline__ void store_vector(void* p, uint4 x) {
  asm volatile("st.global.v4.u32 [%0], {%1, %2, %3, %4};" ::"l"(__cvta_generic_to_global(p)), "r"(x.x),
               "r"(x.y), "r"(x.z), "r"(x.w)
               : "memory");
}
__device__ __forceinline__ void store_vector(void* p, uint2 x) {
  asm volatile("st.global.v2.u32 [%0], {%1, %2};" ::"l"(__cvta_generic_to_global(p)), "r"(x.x), "r"(x.y)
               : "memory");
}

}  // namespace gptcore::cuda
