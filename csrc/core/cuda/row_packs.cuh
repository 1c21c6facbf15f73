// A thread's share of a row, kept as it lies in memory: 16 bytes hold twice as many elements of bf16 as registers of
// f32 would, and widening one costs an instruction.
//
// A row is cut into packs whatever its alignment, so that which thread takes which element, and with it the bits of a
// sum, never depends on where the row lies; `packed` says whether packs may be moved whole.
#pragma once

#include "core/cuda/pack.cuh"

namespace gptcore::cuda {

// Whether all these rows may be moved in whole packs of T: none ends within one.
template <class T>
inline bool rows_are_packed(int64_t width) {
  return width % kPackElements<T> == 0;
}
template <class T, class... More>
inline bool rows_are_packed(int64_t width, const void* p, int64_t stride, More... more) {
  return can_pack<T>(p, stride) && rows_are_packed<T>(width, more...);
}

__device__ __forceinline__ void unpack(const uint4& raw, float (&v)[4]) {
  v[0] = __uint_as_float(raw.x), v[1] = __uint_as_float(raw.y);
  v[2] = __uint_as_float(raw.z), v[3] = __uint_as_float(raw.w);
}
__device__ __forceinline__ void unpack_word(uint32_t word, float& low, float& high) {
  low = __uint_as_float(word << 16), high = __uint_as_float(word & 0xffff0000u);
}
__device__ __forceinline__ void unpack(const uint4& raw, float (&v)[8]) {
  unpack_word(raw.x, v[0], v[1]), unpack_word(raw.y, v[2], v[3]);
  unpack_word(raw.z, v[4], v[5]), unpack_word(raw.w, v[6], v[7]);
}

// Lets what follows widen the pack anew: kept from one pass over a row to the next, its elements would take twice the
// registers.
__device__ __forceinline__ void forget_elements(uint4& raw) {
  asm("" : "+r"(raw.x), "+r"(raw.y), "+r"(raw.z), "+r"(raw.w));
}

// Rounded to the type that 4 (f32) or 8 (bf16) elements of 16 bytes have.
__device__ __forceinline__ uint4 pack(const float (&v)[4]) {
  return make_uint4(__float_as_uint(v[0]), __float_as_uint(v[1]), __float_as_uint(v[2]),
                    __float_as_uint(v[3]));
}
__device__ __forceinline__ uint4 pack(const float (&v)[8]) {
  return make_uint4(pack_pair<bf16>(v[0], v[1]), pack_pair<bf16>(v[2], v[3]), pack_pair<bf16>(v[4], v[5]),
                    pack_pair<bf16>(v[6], v[7]));
}

// How much of the pack from column c on exists.
template <class T>
__device__ __forceinline__ int left_of(int64_t width, int64_t c) {
  return width - c < kPackElements<T> ? static_cast<int>(width - c) : kPackElements<T>;
}

// The pack at p, of which `left` elements exist (none where it is 0 or less; more than all count as all); zeros after
// them.
template <class T>
__device__ __forceinline__ uint4 load_raw(const T* p, int left, bool packed) {
  constexpr int kCount = kPackElements<T>;
  if (packed) return left > 0 ? *reinterpret_cast<const uint4*>(p) : make_uint4(0, 0, 0, 0);
  float v[kCount];
#pragma unroll
  for (int i = 0; i < kCount; ++i) v[i] = i < left ? to_float(p[i]) : 0.0f;
  return pack(v);
}

template <class T>
__device__ __forceinline__ void store_some(T* p, const float (&v)[kPackElements<T>], int left, bool packed) {
  if (packed) {
    if (left > 0) *reinterpret_cast<uint4*>(p) = pack(v);
    return;
  }
#pragma unroll
  for (int i = 0; i < kPackElements<T>; ++i) {
    if (i < left) p[i] = from_float<T>(v[i]);
  }
}

// kPacks packs of one row, `step` elements apart; all are asked for before the first is used. Packs of which nothing
// exists keep what they had, which costs nothing.
template <class T, int kPacks>
__device__ __forceinline__ void load_packs(const T* p, int left, int step, bool packed,
                                           uint4 (&raw)[kPacks]) {
  if (packed) {
#pragma unroll
    for (int k = 0; k < kPacks; ++k) {
      if (left > k * step) raw[k] = *reinterpret_cast<const uint4*>(p + k * step);
    }
  } else {
#pragma unroll
    for (int k = 0; k < kPacks; ++k) raw[k] = load_raw(p + k * step, left - k * step, false);
  }
}

// What every row shares, a weight or a bias of f32 or bf16: kCount of its elements from column c on, `otherwise` where
// there is none. Read-only, so that the loads need not wait for stores before them.
template <int kCount>
__device__ __forceinline__ void load_vector(const void* vector, bool is_bf16, int64_t c, int left,
                                            bool packed, float otherwise, float (&v)[kCount]) {
  static_assert(kCount == 4 || kCount == 8);
  if (!vector || left <= 0) {
#pragma unroll
    for (int i = 0; i < kCount; ++i) v[i] = otherwise;
  } else if (!packed) {
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      v[i] = i >= left ? otherwise
             : is_bf16 ? to_float(static_cast<const bf16*>(vector)[c + i])
                       : static_cast<const float*>(vector)[c + i];
    }
  } else if (is_bf16) {
    const bf16* p = static_cast<const bf16*>(vector) + c;
    if constexpr (kCount == 8) {
      unpack(__ldg(reinterpret_cast<const uint4*>(p)), v);
    } else {
      const uint2 raw = __ldg(reinterpret_cast<const uint2*>(p));
      unpack_word(raw.x, v[0], v[1]), unpack_word(raw.y, v[2], v[3]);
    }
  } else {
    const float* p = static_cast<const float*>(vector) + c;
#pragma unroll
    for (int i = 0; i < kCount; i += 4) {
      const float4 raw = __ldg(reinterpret_cast<const float4*>(p + i));
      v[i] = raw.x, v[i + 1] = raw.y, v[i + 2] = raw.z, v[i + 3] = raw.w;
    }
  }
}

}  // namespace gptcore::cuda
