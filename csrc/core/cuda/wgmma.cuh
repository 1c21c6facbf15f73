// Products of a warpgroup (128 threads, sm_90a): D (64 x N, f32) = or += A (64 x 16) B (16 x N), bf16 or f16, with B in
// shared memory, A there or in registers, D in registers. They run on their own time:
//
//   wgmma_fence(d);                      // behind ordinary writes to d and to A's registers
//   wgmma<N, T, ...>(d, a, b, false);    // overwrites d
//   wgmma<N, T, ...>(d, a2, b2, true);   // adds to it; products into the same d are in order
//   wgmma_commit();
//   wgmma_wait<0>(d);                    // all but the latest 0 groups are done; until then hands off d, A and B
//
// What a warp's wait tells it is true of its own 16 rows: behind it each *warp* says that shared memory is free.
//
// Registers, with warp w of the four, g = lane / 4, t = lane % 4:
//   d[4 j + 2 h + c]   row 16 w + g + 8 h, column 8 j + 2 t + c
//   a[h + 2 k]         row 16 w + g + 8 h, columns 8 k + 2 t and, in the upper half, the one after it
// so that columns 16 i to 16 i + 15 of a D are A's four registers: pairs (d[8 i], d[8 i + 1]), (.. + 2, + 3), ...
//
// A tile in shared memory is cut along its rows into panels of kSwizzle bytes (128, 64 or 32; 64, 32 or 16 elements),
// one behind the other, each with all rows, 16-byte chunks of a row permuted: chunk c of row r at c ^ (r mod 8) for 128,
// c ^ (r / 2 mod 4) for 64, c ^ (r / 4 mod 2) for 32. So does tma_load lay down a box of kSwizzle bytes a row. In terms
// of addresses, bits 4 to 6 (5, 4) take those from bit 7 on by exclusive or: panels begin at multiples of 8 kSwizzle.
// The operand is either
//   K-major    the tile's rows are D's rows (A) or columns (B), its columns the 16 summed over; or
//   MN-major   the other way round: the instruction transposes.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <type_traits>

#include "core/cuda/hopper.cuh"

namespace gptcore::cuda {

// --- where operands lie ----------------------------------------------------------------------------------------
//
// 64 bits: 0-13 the address, 16-29 and 32-45 two distances (all in 16 bytes), 62-63 the swizzle (1, 2, 3 for 128, 64,
// 32). K-major: the second distance goes from eight rows to the next eight; the first is not used within a swizzle.
// MN-major: the first goes from panel to panel, the second from eight rows to the next eight.

template <int kSwizzle>
__device__ __forceinline__ uint64_t operand(uint32_t address, unsigned panel_bytes) {
  static_assert(kSwizzle == 128 || kSwizzle == 64 || kSwizzle == 32);
  constexpr uint64_t kMode = kSwizzle == 128 ? 1 : kSwizzle == 64 ? 2 : 3;
  return kMode << 62 | uint64_t{8 * kSwizzle / 16} << 32 | uint64_t{panel_bytes >> 4} << 16 |
         ((address & 0x3ffffu) >> 4);
}

// Of a tile of kRows rows at `tile`, for its first 16 columns (K-major) or rows (MN-major).
template <int kSwizzle>
__device__ __forceinline__ uint64_t k_major_operand(const void* tile) {
  return operand<kSwizzle>(shared_address(tile), 16);
}
template <int kSwizzle, int kRows>
__device__ __forceinline__ uint64_t mn_major_operand(const void* tile) {
  return operand<kSwizzle>(shared_address(tile), kRows * kSwizzle);
}

// What to add for the i-th 16 of them,
template <int kSwizzle, int kRows>
__host__ __device__ __forceinline__ constexpr uint64_t k_major_step(int i) {
  return static_cast<uint64_t>(i * 32 / kSwizzle * kRows * kSwizzle + i * 32 % kSwizzle) >> 4;
}
template <int kSwizzle>
__host__ __device__ __forceinline__ constexpr uint64_t mn_major_step(int i) {
  return static_cast<uint64_t>(i * 16 * kSwizzle) >> 4;
}
// and for D's rows or columns from `first` on: a multiple of 8 (K-major), or of a panel's columns (MN-major).
template <int kSwizzle>
__host__ __device__ __forceinline__ constexpr uint64_t k_major_rows(int first) {
  return static_cast<uint64_t>(first * kSwizzle) >> 4;
}
template <int kSwizzle, int kRows>
__host__ __device__ __forceinline__ constexpr uint64_t mn_major_rows(int first) {
  return static_cast<uint64_t>(first * 2 / kSwizzle * kRows * kSwizzle) >> 4;
}

// --- order -----------------------------------------------------------------------------------------------------

// Keeps the compiler from moving work on these registers across this point.
template <int kCount>
__device__ __forceinline__ void pin(float (&d)[kCount]) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) asm volatile("" : "+f"(d[i])::"memory");
}
template <int kCount>
__device__ __forceinline__ void pin(uint32_t (&a)[kCount]) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) asm volatile("" : "+r"(a[i])::"memory");
}

// A number that the compiler takes for another behind this point: what follows from it, such as the operands of every
// product of a loop, is computed there again instead of kept in registers.
__device__ __forceinline__ void pin(int& x) { asm volatile("" : "+r"(x)); }

// Ends the old values, for sums of a loop's earlier pass that are about to be overwritten: else the compiler moves values
// between passes, which products under way do not suffer.
template <int kCount>
__device__ __forceinline__ void discard(float (&d)[kCount]) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) asm volatile("" : "=f"(d[i]));
}

template <class... Registers>
__device__ __forceinline__ void wgmma_fence(Registers&... registers) {
  (pin(registers), ...);
  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
}
__device__ __forceinline__ void wgmma_commit() {
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}
template <int kLeft, class... Registers>
__device__ __forceinline__ void wgmma_wait(Registers&... registers) {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kLeft) : "memory");
  (pin(registers), ...);
}

// --- products --------------------------------------------------------------------------------------------------

template <int N>
struct Wgmma;

#define GPTCORE_NAMES_32 "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15"
#define GPTCORE_NAMES_64 \
  GPTCORE_NAMES_32       \
  ", %16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define GPTCORE_NAMES_96 \
  GPTCORE_NAMES_64       \
  ", %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47"
#define GPTCORE_NAMES_128 \
  GPTCORE_NAMES_96        \
  ", %48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
#define GPTCORE_NAMES_192                                                            \
  GPTCORE_NAMES_128                                                                  \
  ", %64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79" \
  ", %80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95"
#define GPTCORE_NAMES_256                                                                        \
  GPTCORE_NAMES_192                                                                              \
  ", %96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109, %110, %111" \
  ", %112, %113, %114, %115, %116, %117, %118, %119, %120, %121, %122, %123, %124, %125, %126, %127"
#define GPTCORE_4(i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3])
#define GPTCORE_16(i) GPTCORE_4(i), GPTCORE_4(i + 4), GPTCORE_4(i + 8), GPTCORE_4(i + 12)
#define GPTCORE_REGISTERS_32 GPTCORE_16(0)
#define GPTCORE_REGISTERS_64 GPTCORE_REGISTERS_32, GPTCORE_16(16)
#define GPTCORE_REGISTERS_96 GPTCORE_REGISTERS_64, GPTCORE_16(32)
#define GPTCORE_REGISTERS_128 GPTCORE_REGISTERS_96, GPTCORE_16(48)
#define GPTCORE_REGISTERS_192 GPTCORE_REGISTERS_128, GPTCORE_16(64), GPTCORE_16(80)
#define GPTCORE_REGISTERS_256 GPTCORE_REGISTERS_192, GPTCORE_16(96), GPTCORE_16(112)

// o0 to o6: the numbers of the operands behind D's.
#define GPTCORE_WGMMA_SHARED(n, type, o0, o1, o2, o3, o4)                                              \
  asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %" #o2 ", 0;\nwgmma.mma_async.sync.aligned.m64n" #n   \
               "k16.f32." type "." type " {" GPTCORE_NAMES_##n "}, %" #o0 ", %" #o1 ", p, 1, 1, %" #o3 \
                                                               ", %" #o4 ";\n}"                        \
               : GPTCORE_REGISTERS_##n                                                                 \
               : "l"(a), "l"(b), "r"(static_cast<int>(add)), "n"(kTransposedA), "n"(kTransposedB)      \
               : "memory")
#define GPTCORE_WGMMA_REGISTERS(n, type, o0, o1, o2, o3, o4, o5, o6)                                     \
  asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %" #o5 ", 0;\nwgmma.mma_async.sync.aligned.m64n" #n     \
               "k16.f32." type "." type " {" GPTCORE_NAMES_##n "}, {%" #o0 ", %" #o1 ", %" #o2 ", %" #o3 \
                                                               "}, %" #o4 ", p, 1, 1, %" #o6 ";\n}"      \
               : GPTCORE_REGISTERS_##n                                                                   \
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(static_cast<int>(add)),         \
                 "n"(kTransposedB)                                                                       \
               : "memory")
#define GPTCORE_WGMMA(n, o0, o1, o2, o3, o4, o5, o6)                                                  \
  template <>                                                                                         \
  struct Wgmma<n> {                                                                                   \
    template <class T, int kTransposedA, int kTransposedB>                                            \
    static __device__ __forceinline__ void run(float (&d)[n / 2], uint64_t a, uint64_t b, bool add) { \
      if constexpr (std::is_same_v<T, bf16>) {                                                        \
        GPTCORE_WGMMA_SHARED(n, "bf16", o0, o1, o2, o3, o4);                                          \
      } else {                                                                                        \
        GPTCORE_WGMMA_SHARED(n, "f16", o0, o1, o2, o3, o4);                                           \
      }                                                                                               \
    }                                                                                                 \
    template <class T, int kTransposedB>                                                              \
    static __device__ __forceinline__ void run(float (&d)[n / 2], const uint32_t (&a)[4], uint64_t b, \
                                               bool add) {                                            \
      if constexpr (std::is_same_v<T, bf16>) {                                                        \
        GPTCORE_WGMMA_REGISTERS(n, "bf16", o0, o1, o2, o3, o4, o5, o6);                               \
      } else {                                                                                        \
        GPTCORE_WGMMA_REGISTERS(n, "f16", o0, o1, o2, o3, o4, o5, o6);                                \
      }                                                                                               \
    }                                                                                                 \
  };
GPTCORE_WGMMA(32, 16, 17, 18, 19, 20, 21, 22)
GPTCORE_WGMMA(64, 32, 33, 34, 35, 36, 37, 38)
GPTCORE_WGMMA(96, 48, 49, 50, 51, 52, 53, 54)
GPTCORE_WGMMA(128, 64, 65, 66, 67, 68, 69, 70)
GPTCORE_WGMMA(192, 96, 97, 98, 99, 100, 101, 102)
GPTCORE_WGMMA(256, 128, 129, 130, 131, 132, 133, 134)
#undef GPTCORE_4
#undef GPTCORE_16
#undef GPTCORE_WGMMA
#undef GPTCORE_WGMMA_SHARED
#undef GPTCORE_WGMMA_REGISTERS

enum class Major { k, mn };

// N: 32, 64, 96, 128, 192 or 256. `add`: to d; else d is overwritten. Majors are those of A and B.
template <int N, class T, Major kA, Major kB>
__device__ __forceinline__ void wgmma(float (&d)[N / 2], uint64_t a, uint64_t b, bool add) {
  Wgmma<N>::template run<T, static_cast<int>(kA), static_cast<int>(kB)>(d, a, b, add);
}
template <int N, class T, Major kB>
__device__ __forceinline__ void wgmma(float (&d)[N / 2], const uint32_t (&a)[4], uint64_t b, bool add) {
  Wgmma<N>::template run<T, static_cast<int>(kB)>(d, a, b, add);
}

}  // namespace gptcore::cuda
