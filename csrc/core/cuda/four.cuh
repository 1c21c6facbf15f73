// Four neighbours at a time, of arrays that an optimizer walks together: 16 bytes of f32 beside 8 of a 16-bit type.
#pragma once

#include "core/cuda/convert.cuh"
#include "core/cuda/vector_store.cuh"

namespace gptcore::cuda {

template <class T>
struct alignas(4 * sizeof(T)) Four {
  T at[4];
};

// Whether the array can be read by fours; null can.
template <class T>
inline bool fits_fours(const T* p) {
  return reinterpret_cast<uintptr_t>(p) % sizeof(Four<T>) == 0;
}

// `whole`: all four exist and lie as fits_fours wants it, so that they are one access: one branch decides for all arrays,
// and what is read is under way together. Else the first n exist, and the others are zeros.
template <bool whole, class T>
__device__ __forceinline__ Four<T> load_four(const T* p, int64_t n) {
  if constexpr (whole) return *reinterpret_cast<const Four<T>*>(p);
  Four<T> x{};
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    if (i < n) x.at[i] = p[i];
  }
  return x;
}

__device__ __forceinline__ uint32_t bits_of(bf16 x) { return x.bits; }
__device__ __forceinline__ uint32_t bits_of(int16_t x) { return static_cast<uint16_t>(x); }

// All four at once.
__device__ __forceinline__ void store_whole(float* p, const Four<float>& x) {
  store_vector(p, make_uint4(__float_as_uint(x.at[0]), __float_as_uint(x.at[1]), __float_as_uint(x.at[2]),
                             __float_as_uint(x.at[3])));
}
__device__ __forceinline__ void store_whole(uint8_t* p, const Four<uint8_t>& x) {
  *reinterpret_cast<Four<uint8_t>*>(p) = x;
}
template <class T>
__device__ __forceinline__ void store_whole(T* p, const Four<T>& x) {
  store_vector(
      p, make_uint2(bits_of(x.at[0]) | bits_of(x.at[1]) << 16, bits_of(x.at[2]) | bits_of(x.at[3]) << 16));
}

template <bool whole, class T>
__device__ __forceinline__ void store_four(T* p, const Four<T>& x, int64_t n) {
  if constexpr (whole) {
    store_whole(p, x);
  } else {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if (i < n) p[i] = x.at[i];
    }
  }
}

template <class T>
__device__ __forceinline__ Four<T> rounded(const Four<float>& x) {
  Four<T> y;
#pragma unroll
  for (int i = 0; i < 4; i += 2) {
    const uint32_t pair = pack_pair<T>(x.at[i], x.at[i + 1]);
    y.at[i] = {static_cast<uint16_t>(pair)}, y.at[i + 1] = {static_cast<uint16_t>(pair >> 16)};
  }
  return y;
}

template <class T>
__device__ __forceinline__ Four<float> widened(const Four<T>& x) {
  Four<float> y;
#pragma unroll
  for (int i = 0; i < 4; ++i) y.at[i] = to_float(x.at[i]);
  return y;
}

// Two at a time: an upper half is a float but for the bits below it, which one instruction clears.
template <>
__device__ __forceinline__ Four<float> widened<bf16>(const Four<bf16>& x) {
  const uint2 pairs = *reinterpret_cast<const uint2*>(&x);
  return {__uint_as_float(pairs.x << 16), __uint_as_float(pairs.x & 0xffff0000u),
          __uint_as_float(pairs.y << 16), __uint_as_float(pairs.y & 0xffff0000u)};
}

// Gradients are f32 or bf16, each tensor its own. What a warp has asked for it waits for where it is used, so the
// halves are widened later than they are read.
struct GradFour {
  Four<float> f32;
  Four<bf16> half;
};
template <bool whole>
__device__ __forceinline__ GradFour load_grad(const void* grad, bool is_half, int64_t i, int64_t n) {
  GradFour x{};
  if (is_half) {
    x.half = load_four<whole>(static_cast<const bf16*>(grad) + i, n);
  } else {
    x.f32 = load_four<whole>(static_cast<const float*>(grad) + i, n);
  }
  return x;
}
__device__ __forceinline__ Four<float> widened(const GradFour& x, bool is_half) {
  return is_half ? widened(x.half) : x.f32;
}

}  // namespace gptcore::cuda
