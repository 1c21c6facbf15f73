// Matrix products of a warp and what feeds them, from sm_80 on: mma.sync, ldmatrix, cp.async. How tiles lie in shared
// memory so that none of these meets bank conflicts: swizzle.cuh.
//
// Fragments, with g = lane / 4 and t = lane % 4; registers of 16-bit types hold two neighbours, the first below:
//   16 x 16 x 16   A  a[0] (g, 2t..)      a[1] (g + 8, 2t..)    a[2] (g, 2t + 8..)  a[3] (g + 8, 2t + 8..)    row, k
//     (16 bit)     B  b0   (2t.., g)      b1   (2t + 8.., g)                                                  k, column
//   16 x 8 x 8     A  a[0] (g, t)         a[1] (g + 8, t)       a[2] (g, t + 4)     a[3] (g + 8, t + 4)
//     (tf32)       B  b0   (t, g)         b1   (t + 4, g)
//   both           D  d[0] (g, 2t)        d[1] (g, 2t + 1)      d[2] (g + 8, 2t)    d[3] (g + 8, 2t + 1)
//
// All of a warp's lanes come to each of these together.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "core/cuda/launch.cuh"
#include "core/cuda/swizzle.cuh"
#include "core/dtype.h"

namespace gptcore::cuda {

// --- asynchronous copies ---------------------------------------------------------------------------------------

// 16 bytes from global to shared memory, both aligned to 16, of which only the first `bytes` (0 to 16) are read and
// the rest become zeros; with 0 the source may be any valid pointer.
__device__ __forceinline__ void copy_async(void* shared, const void* global, int bytes = 16) {
  asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;" ::"r"(shared_address(shared)),
               "l"(global), "r"(bytes)
               : "memory");
}
// Closes a group of this thread's copies.
__device__ __forceinline__ void copy_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
// Until all but the latest `kLeft` groups of this thread have arrived; a barrier then shows them to others.
template <int kLeft>
__device__ __forceinline__ void copy_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kLeft) : "memory");
}

// --- fragments from shared memory ------------------------------------------------------------------------------

// Matrices of 8 rows of 16 bytes; lanes 8 i to 8 i + 7 point at the rows of matrix i, which comes in r[i]: lane l gets
// the 4 bytes at 4 (l % 4) of row l / 4. For x2 lanes 0 to 15 point, and the others' pointers are valid too.
__device__ __forceinline__ void load_matrices(uint32_t (&r)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address(row))
               : "memory");
}
__device__ __forceinline__ void load_matrices(uint32_t (&r)[2], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0, %1}, [%2];"
               : "=r"(r[0]), "=r"(r[1])
               : "r"(shared_address(row))
               : "memory");
}
// The same, each 8 x 8 matrix of 16-bit elements transposed: lane l gets elements 2 (l % 4) and 2 (l % 4) + 1 of
// column l / 4.
__device__ __forceinline__ void load_matrices_transposed(uint32_t (&r)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address(row))
               : "memory");
}
__device__ __forceinline__ void load_matrices_transposed(uint32_t (&r)[2], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%0, %1}, [%2];"
               : "=r"(r[0]), "=r"(r[1])
               : "r"(shared_address(row))
               : "memory");
}

// --- products --------------------------------------------------------------------------------------------------

// d += a b: 16 x 8 from depth 16, f32 sums. T is bf16 or f16.
template <class T>
__device__ __forceinline__ void mma_16x8x16(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1);
template <>
__device__ __forceinline__ void mma_16x8x16<bf16>(float (&d)[4], const uint32_t (&a)[4], uint32_t b0,
                                                  uint32_t b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
template <>
__device__ __forceinline__ void mma_16x8x16<f16>(float (&d)[4], const uint32_t (&a)[4], uint32_t b0,
                                                 uint32_t b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// The nearest number of 11 significant bits, as mma_16x8x8_tf32 takes its operands (it ignores bits below those).
__device__ __forceinline__ uint32_t to_tf32(float x) {
  uint32_t bits;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(bits) : "f"(x));
  return bits;
}
// d += a b: 16 x 8 from depth 8, of tf32 operands, f32 sums.
__device__ __forceinline__ void mma_16x8x8_tf32(float (&d)[4], const uint32_t (&a)[4], uint32_t b0,
                                                uint32_t b1) {
  asm("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

}  // namespace gptcore::cuda
