// CUDA C++'s own words, for the processor.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>

#include "simt.h"

#define __global__ inline
#define __device__
#define __host__
#define __constant__
#define __forceinline__ inline
#define __noinline__
#define __restrict__ __restrict
#define __grid_constant__
#define __launch_bounds__(...)
#define __align__(n) alignas(n)

#define threadIdx (::simt::current->index)
#define blockIdx (::simt::current->block->index)
#define blockDim (::simt::grid.threads)
#define gridDim (::simt::grid.blocks)
constexpr int warpSize = 32;

struct alignas(8) int2 {
  int x, y;
};
struct alignas(16) int4 {
  int x, y, z, w;
};
struct alignas(8) uint2 {
  unsigned x, y;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
struct alignas(8) float2 {
  float x, y;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
inline int2 make_int2(int x, int y) { return {x, y}; }
inline int4 make_int4(int x, int y, int z, int w) { return {x, y, z, w}; }
inline uint2 make_uint2(unsigned x, unsigned y) { return {x, y}; }
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }
inline float2 make_float2(float x, float y) { return {x, y}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }

// --- arithmetic ------------------------------------------------------------------------------------------------

using std::isfinite;
using std::isinf;
using std::isnan;
using std::max;
using std::min;
inline float rsqrtf(float x) { return 1.0f / std::sqrt(x); }
inline float __expf(float x) { return std::exp(x); }
inline float __logf(float x) { return std::log(x); }
inline float __log2f(float x) { return std::log2(x); }
inline float __fdividef(float x, float y) { return x / y; }
inline float __fmaf_rn(float x, float y, float z) { return std::fma(x, y, z); }
inline float __fadd_rn(float x, float y) { return x + y; }
inline float __fmul_rn(float x, float y) { return x * y; }
inline float __fdiv_rn(float x, float y) { return x / y; }
inline float __fsqrt_rn(float x) { return std::sqrt(x); }
inline float __frcp_rn(float x) { return 1.0f / x; }
inline float __saturatef(float x) { return std::min(std::max(x, 0.0f), 1.0f); }
template <class To, class From>
inline To simt_bits(From x) {
  static_assert(sizeof(To) == sizeof(From));
  To y;
  std::memcpy(&y, &x, sizeof(y));
  return y;
}
inline float __uint_as_float(unsigned x) { return simt_bits<float>(x); }
inline unsigned __float_as_uint(float x) { return simt_bits<unsigned>(x); }
inline float __int_as_float(int x) { return simt_bits<float>(x); }
inline int __float_as_int(float x) { return simt_bits<int>(x); }
inline long long __double_as_longlong(double x) { return simt_bits<long long>(x); }
inline double __longlong_as_double(long long x) { return simt_bits<double>(x); }
inline int __float2int_rn(float x) { return static_cast<int>(std::nearbyint(x)); }
inline int __float2int_rd(float x) { return static_cast<int>(std::floor(x)); }
inline unsigned __float2uint_rn(float x) { return static_cast<unsigned>(std::nearbyint(x)); }
inline unsigned __umulhi(unsigned a, unsigned b) { return static_cast<unsigned>(uint64_t{a} * b >> 32); }
inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __clz(int x) { return x ? __builtin_clz(static_cast<unsigned>(x)) : 32; }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline unsigned __byte_perm(unsigned x, unsigned y, unsigned selector) {
  const uint64_t both = uint64_t{y} << 32 | x;
  unsigned result = 0;
  for (int i = 0; i < 4; ++i) {
    const unsigned pick = selector >> (4 * i) & 0xf;
    unsigned byte = static_cast<unsigned>(both >> (8 * (pick & 7))) & 0xff;
    if (pick & 8) byte = byte & 0x80 ? 0xff : 0;
    result |= byte << (8 * i);
  }
  return result;
}

// --- memory ----------------------------------------------------------------------------------------------------

template <class T>
inline T __ldg(const T* p) {
  return *p;
}
template <class T>
inline T __ldcs(const T* p) {
  return *p;
}
template <class T>
inline T __ldcg(const T* p) {
  return *p;
}
template <class T>
inline T __ldca(const T* p) {
  return *p;
}
template <class T>
inline void __stcs(T* p, T x) {
  *p = x;
}
template <class T>
inline void __stcg(T* p, T x) {
  *p = x;
}
inline void __threadfence() {}
inline void __threadfence_block() {}
template <class T, class V>
inline T atomicAdd(T* p, V x) {
  const T before = *p;
  *p = static_cast<T>(before + x);
  return before;
}
template <class T, class V>
inline T atomicMax(T* p, V x) {
  const T before = *p;
  *p = std::max(before, static_cast<T>(x));
  return before;
}
template <class T, class V>
inline T atomicMin(T* p, V x) {
  const T before = *p;
  *p = std::min(before, static_cast<T>(x));
  return before;
}
template <class T, class V>
inline T atomicOr(T* p, V x) {
  const T before = *p;
  *p = static_cast<T>(before | x);
  return before;
}
template <class T, class V>
inline T atomicExch(T* p, V x) {
  const T before = *p;
  *p = static_cast<T>(x);
  return before;
}
template <class T, class C, class V>
inline T atomicCAS(T* p, C compare, V x) {
  const T before = *p;
  if (before == static_cast<T>(compare)) *p = static_cast<T>(x);
  return before;
}

// --- threads together ------------------------------------------------------------------------------------------

inline void __syncthreads() { ::simt::barrier(0, 0); }
inline void __syncwarp(unsigned mask = 0xffffffffu) { ::simt::meet(mask, 0); }
template <class T>
inline T simt_shuffle(unsigned mask, T x, unsigned from) {
  static_assert(sizeof(T) <= 8);
  uint64_t bits = 0;
  std::memcpy(&bits, &x, sizeof(T));
  const uint64_t* all = ::simt::meet(mask, bits);
  T y;
  std::memcpy(&y, &all[from & 31], sizeof(T));
  return y;
}
template <class T>
inline T __shfl_sync(unsigned mask, T x, int from, int width = 32) {
  const unsigned base = ::simt::lane() & ~static_cast<unsigned>(width - 1);
  return simt_shuffle(mask, x, base + (static_cast<unsigned>(from) & static_cast<unsigned>(width - 1)));
}
template <class T>
inline T __shfl_xor_sync(unsigned mask, T x, int step, int = 32) {
  return simt_shuffle(mask, x, ::simt::lane() ^ static_cast<unsigned>(step));
}
template <class T>
inline T __shfl_down_sync(unsigned mask, T x, unsigned step, int width = 32) {
  const unsigned own = ::simt::lane() & static_cast<unsigned>(width - 1);
  return simt_shuffle(mask, x,
                      own + step < static_cast<unsigned>(width) ? ::simt::lane() + step : ::simt::lane());
}
template <class T>
inline T __shfl_up_sync(unsigned mask, T x, unsigned step, int width = 32) {
  const unsigned own = ::simt::lane() & static_cast<unsigned>(width - 1);
  return simt_shuffle(mask, x, own >= step ? ::simt::lane() - step : ::simt::lane());
}
inline unsigned __ballot_sync(unsigned mask, int predicate) {
  const uint64_t* all = ::simt::meet(mask, predicate != 0);
  unsigned votes = 0;
  for (unsigned i = 0; i < 32; ++i) {
    if (mask >> i & 1 &&
        ::simt::current->block->warps[static_cast<size_t>(::simt::current->linear) / 32].lanes >> i & 1)
      votes |= static_cast<unsigned>(all[i]) << i;
  }
  return votes;
}
inline int __any_sync(unsigned mask, int predicate) { return __ballot_sync(mask, predicate) != 0; }
inline int __all_sync(unsigned mask, int predicate) { return __ballot_sync(mask, !predicate) == 0; }
template <class T>
inline unsigned __match_any_sync(unsigned mask, T x) {
  uint64_t bits = 0;
  std::memcpy(&bits, &x, sizeof(T));
  const uint64_t* all = ::simt::meet(mask, bits);
  unsigned same = 0;
  for (unsigned i = 0; i < 32; ++i) same |= static_cast<unsigned>((mask >> i & 1) && all[i] == bits) << i;
  return same;
}
