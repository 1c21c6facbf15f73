// Operands of the tensor cores' products, as a lane holds them: 16-bit numbers in pairs, f32 numbers one by one. Of f32
// the tensor cores take 11 significant bits (tf32): plainly, or each number as the sum of two, with the three products
// that count; what is lost then is below f32's own rounding.
#pragma once

#include "core/cuda/convert.cuh"
#include "core/cuda/launch.cuh"
#include "core/cuda/mma.cuh"

namespace gptcore::cuda {

// The type of kernels whose tensors are f32 and whose products are plain tf32.
struct tf32 {
  float value;
};
__device__ __forceinline__ float to_float(tf32 x) { return x.value; }
template <>
__device__ __forceinline__ tf32 from_float<tf32>(float x) {
  return {x};
}

// kCount registers' worth. T: bf16 or f16, f32 in two parts, or tf32.
template <class T, int kCount>
struct Operands {
  uint32_t high[kCount];

  __device__ __forceinline__ void set(int i, uint32_t bits) { high[i] = bits; }
};

template <int kCount>
struct Operands<float, kCount> {
  uint32_t high[kCount], low[kCount];

  // An infinity's second part is nothing.
  __device__ __forceinline__ void set(int i, uint32_t bits) {
    const float x = __uint_as_float(bits);
    high[i] = to_tf32(x);
    const float rest = x - __uint_as_float(high[i]);
    low[i] = __float_as_uint(rest == rest ? rest : 0.0f);
  }
};

template <int kCount>
struct Operands<tf32, kCount> {
  uint32_t high[kCount];

  __device__ __forceinline__ void set(int i, uint32_t bits) { high[i] = to_tf32(__uint_as_float(bits)); }
};

template <class T, int kCount>
__device__ __forceinline__ Operands<T, kCount> operands(const uint32_t (&bits)[kCount]) {
  Operands<T, kCount> x;
#pragma unroll
  for (int i = 0; i < kCount; ++i) x.set(i, bits[i]);
  return x;
}

// d += a b: 16 x 8, of the columns in b's registers `at` and at + 1; small products first.
template <class T, int kCount>
__device__ __forceinline__ void multiply_add(float (&d)[4], const Operands<T, 4>& a,
                                             const Operands<T, kCount>& b, int at) {
  if constexpr (sizeof(T) == 2) {
    mma_16x8x16<T>(d, a.high, b.high[at], b.high[at + 1]);
  } else {
    if constexpr (sizeof(Operands<T, 1>) == 8) {
      mma_16x8x8_tf32(d, a.low, b.high[at], b.high[at + 1]);
      mma_16x8x8_tf32(d, a.high, b.low[at], b.low[at + 1]);
    }
    mma_16x8x8_tf32(d, a.high, b.high[at], b.high[at + 1]);
  }
}

}  // namespace gptcore::cuda
