// Several elements in one access: 16 bytes a thread is what device memory is read and written with at full rate.
#pragma once

#include "core/cuda/convert.cuh"

namespace gptcore::cuda {

constexpr int kPackBytes = 16;
template <class T>
constexpr int kPackElements = kPackBytes / static_cast<int>(sizeof(T));

template <class T>
struct alignas(kPackBytes) Pack {
  T at[kPackElements<T>];
};

// Whether rows from `p` on, `stride` elements apart, may be read in packs.
template <class T>
__host__ __device__ __forceinline__ bool can_pack(const void* p, int64_t stride) {
  return ((reinterpret_cast<uintptr_t>(p) |
           static_cast<uintptr_t>(stride * static_cast<int64_t>(sizeof(T)))) &
          (kPackBytes - 1)) == 0;
}

template <class T>
__device__ __forceinline__ void load_pack(const T* p, float (&values)[kPackElements<T>]) {
  const Pack<T> pack = *reinterpret_cast<const Pack<T>*>(p);
#pragma unroll
  for (int i = 0; i < kPackElements<T>; ++i) values[i] = to_float(pack.at[i]);
}

template <class T>
__device__ __forceinline__ void store_pack(T* p, const float (&values)[kPackElements<T>]) {
  Pack<T> pack;
#pragma unroll
  for (int i = 0; i < kPackElements<T>; ++i) pack.at[i] = from_float<T>(values[i]);
  *reinterpret_cast<Pack<T>*>(p) = pack;
}

}  // namespace gptcore::cuda
