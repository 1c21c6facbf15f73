// csrc/core/cuda/mma.cuh for the processor. Each instruction is one meeting of a warp, whose first comer from it does
// the work of all.
#pragma once

#include <cuda_runtime.h>

#include "core/cuda/convert.cuh"
#include "core/cuda/launch.cuh"
#include "core/cuda/swizzle.cuh"

namespace gptcore::cuda {

inline void simt_expect_aligned(const void* p, const char* what) {
  if (reinterpret_cast<uintptr_t>(p) % 16 != 0) simt::fail(std::string(what) + " is not a multiple of 16");
}

// --- asynchronous copies: each is done at once or by the wait, as chance has it ---------------------------------

inline void copy_async(void* shared, const void* global, int bytes = 16) {
  shared_address(shared);
  simt_expect_aligned(shared, "a copy's shared address");
  simt_expect_aligned(global, "a copy's global address");
  simt::copy({static_cast<unsigned char*>(shared), static_cast<const unsigned char*>(global), bytes});
}
inline void copy_async_commit() { simt::commit_copies(); }
template <int kLeft>
inline void copy_async_wait() {
  simt::wait_for_copies(kLeft);
}

// --- fragments -------------------------------------------------------------------------------------------------

struct SimtLoad {
  const unsigned char* row;
  uint32_t* r;
  bool done = false;
};

template <int kMatrices, bool kTransposed>
inline void simt_load_matrices(uint32_t (&r)[kMatrices], const void* row) {
  shared_address(row);
  simt_expect_aligned(row, "a matrix row's address");
  SimtLoad mine{static_cast<const unsigned char*>(row), r};
  simt::together(mine, [](SimtLoad* const(&lanes)[32]) {
    for (int i = 0; i < kMatrices; ++i) {
      for (int l = 0; l < 32; ++l) {
        if constexpr (kTransposed) {
          uint16_t pair[2];
          for (int j = 0; j < 2; ++j)
            std::memcpy(&pair[j], lanes[8 * i + 2 * (l % 4) + j]->row + 2 * (l / 4), 2);
          std::memcpy(&lanes[l]->r[i], pair, 4);
        } else {
          std::memcpy(&lanes[l]->r[i], lanes[8 * i + l / 4]->row + 4 * (l % 4), 4);
        }
      }
    }
  });
}
inline void load_matrices(uint32_t (&r)[4], const void* row) { simt_load_matrices<4, false>(r, row); }
inline void load_matrices(uint32_t (&r)[2], const void* row) { simt_load_matrices<2, false>(r, row); }
inline void load_matrices_transposed(uint32_t (&r)[4], const void* row) {
  simt_load_matrices<4, true>(r, row);
}
inline void load_matrices_transposed(uint32_t (&r)[2], const void* row) {
  simt_load_matrices<2, true>(r, row);
}

// --- products --------------------------------------------------------------------------------------------------

struct SimtProduct {
  float* d;
  const uint32_t* a;
  uint32_t b[2];
  bool done = false;
};

// kPer: how many elements a register holds; read(register, i) gives the i-th.
template <int kPer, class Read>
inline void simt_product(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, const Read& read) {
  SimtProduct mine{d, a, {b0, b1}};
  simt::together(mine, [&](SimtProduct* const(&lanes)[32]) {
    constexpr int kDepth = 8 * kPer;
    float rows[16][kDepth], columns[kDepth][8], sums[16][8] = {};
    for (int l = 0; l < 32; ++l) {
      const int g = l / 4, t = l % 4;
      for (int i = 0; i < kPer; ++i) {
        for (int half = 0; half < 2; ++half) {
          const int k = kPer * t + i + 4 * kPer * half;
          rows[g][k] = read(lanes[l]->a[2 * half], i);
          rows[g + 8][k] = read(lanes[l]->a[2 * half + 1], i);
          columns[k][g] = read(lanes[l]->b[half], i);
        }
      }
    }
    for (int m = 0; m < 16; ++m) {
      for (int k = 0; k < kDepth; ++k) {
        for (int n = 0; n < 8; ++n) sums[m][n] += rows[m][k] * columns[k][n];
      }
    }
    for (int l = 0; l < 32; ++l) {
      for (int i = 0; i < 4; ++i) lanes[l]->d[i] += sums[l / 4 + 8 * (i / 2)][2 * (l % 4) + i % 2];
    }
  });
}

template <class T>
inline void mma_16x8x16(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  simt_product<2>(d, a, b0, b1,
                  [](uint32_t x, int i) { return to_float(T{static_cast<uint16_t>(x >> (16 * i))}); });
}

// To the nearest, halves away from zero.
inline uint32_t to_tf32(float x) {
  const uint32_t bits = __float_as_uint(x);
  return std::isfinite(x) ? (bits + 0x1000u) & 0xffffe000u : bits;
}
inline void mma_16x8x8_tf32(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  simt_product<1>(d, a, b0, b1, [](uint32_t x, int) {
    return __uint_as_float(std::isnan(__uint_as_float(x)) ? x : x & 0xffffe000u);
  });
}

}  // namespace gptcore::cuda
