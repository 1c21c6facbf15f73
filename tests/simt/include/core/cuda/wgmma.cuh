// csrc/core/cuda/wgmma.cuh for the processor. A product is computed by the wait for it, each thread its own part, from
// what then lies in shared memory.
#pragma once

#include <cuda_runtime.h>

#include <array>
#include <vector>

#include "core/cuda/convert.cuh"
#include "core/cuda/hopper.cuh"

namespace gptcore::cuda {

// --- where operands lie ----------------------------------------------------------------------------------------

template <int kSwizzle>
inline uint64_t operand(uint32_t address, unsigned panel_bytes) {
  static_assert(kSwizzle == 128 || kSwizzle == 64 || kSwizzle == 32);
  constexpr uint64_t kMode = kSwizzle == 128 ? 1 : kSwizzle == 64 ? 2 : 3;
  if (address % (8 * kSwizzle) != 0) simt::fail("a product's tile at an address that splits its swizzle");
  return kMode << 62 | uint64_t{8 * kSwizzle / 16} << 32 | uint64_t{panel_bytes >> 4} << 16 |
         ((address & 0x3ffffu) >> 4);
}

template <int kSwizzle>
inline uint64_t k_major_operand(const void* tile) {
  return operand<kSwizzle>(shared_address(tile), 16);
}
template <int kSwizzle, int kRows>
inline uint64_t mn_major_operand(const void* tile) {
  return operand<kSwizzle>(shared_address(tile), kRows * kSwizzle);
}
template <int kSwizzle, int kRows>
constexpr uint64_t k_major_step(int i) {
  return static_cast<uint64_t>(i * 32 / kSwizzle * kRows * kSwizzle + i * 32 % kSwizzle) >> 4;
}
template <int kSwizzle>
constexpr uint64_t mn_major_step(int i) {
  return static_cast<uint64_t>(i * 16 * kSwizzle) >> 4;
}
template <int kSwizzle>
constexpr uint64_t k_major_rows(int first) {
  return static_cast<uint64_t>(first * kSwizzle) >> 4;
}
template <int kSwizzle, int kRows>
constexpr uint64_t mn_major_rows(int first) {
  return static_cast<uint64_t>(first * 2 / kSwizzle * kRows * kSwizzle) >> 4;
}

enum class Major { k, mn };

// The element `mn` of D's rows or columns and `k` of the 16 summed over, by the instruction's own rules.
template <class T>
inline float simt_element(uint64_t operand, Major major, int mn, int k) {
  const auto start = static_cast<int64_t>(operand & 0x3fff) << 4;
  const auto first = static_cast<int64_t>(operand >> 16 & 0x3fff) << 4;
  const auto second = static_cast<int64_t>(operand >> 32 & 0x3fff) << 4;
  const int mode = static_cast<int>(operand >> 62), width = mode == 1 ? 128 : mode == 2 ? 64 : 32;
  const int64_t place =
      major == Major::k ? start + mn / 8 * second + mn % 8 * width + 2 * k
                        : start + 2 * mn / width * first + 2 * mn % width + k / 8 * second + k % 8 * width;
  const int64_t swizzled = place ^ (place >> 7 & (width / 16 - 1)) << 4;
  const simt::Block& block = *simt::current->block;
  if (swizzled + 2 > block.shared_bytes) simt::fail("a product reads past the end of shared memory");
  T value;
  std::memcpy(&value, block.shared + swizzled, sizeof(value));
  return to_float(value);
}

// --- order -----------------------------------------------------------------------------------------------------

template <int kCount, class Register>
inline void pin(Register (&)[kCount]) {}
inline void pin(int&) {}
template <int kCount>
inline void discard(float (&d)[kCount]) {
  for (float& x : d) x = NAN;
}

template <class... Registers>
inline void wgmma_fence(Registers&...) {
  simt::current->products_fenced = true;
}
inline void wgmma_commit() { simt::current->products.commit(); }
template <int kLeft, class... Registers>
inline void wgmma_wait(Registers&...) {
  simt::current->products.wait(kLeft);
  simt::current->products_fenced = false;
  __syncwarp();
}

// --- products --------------------------------------------------------------------------------------------------

struct SimtRows {  // this thread's two of A
  float at[2][16];
};

// read_a(): SimtRows, called when the product is computed.
template <int N, class T, Major kB, class ReadA>
inline void simt_product_later(float (&d)[N / 2], uint64_t b, bool add, const ReadA& read_a) {
  if (!simt::current->products_fenced) simt::fail("a product without a wgmma_fence since the last wait");
  std::array<float, N / 2> before;
  std::memcpy(before.data(), d, sizeof(d));
  float* const sums = d;
  const bool first = simt::current->begin_product(sums);
  simt::current->products.open.push_back([=] {
    if (first && std::memcmp(before.data(), sums, sizeof(before)) != 0)
      simt::fail("a product's sums were written before it was waited for");
    simt::current->end_product(sums);
    const SimtRows a = read_a();
    const int t = lane() % 4;
    for (int column = 2 * t; column < N; column += column % 2 ? 7 : 1) {
      float sum[2] = {};
      for (int k = 0; k < 16; ++k) {
        const float x = simt_element<T>(b, kB, column, k);
        for (int h = 0; h < 2; ++h) sum[h] += a.at[h][k] * x;
      }
      for (int h = 0; h < 2; ++h) {
        float& out = sums[column / 8 * 4 + 2 * h + column % 2];
        out = (add ? out : 0.0f) + sum[h];
      }
    }
  });
}

template <int N, class T, Major kA, Major kB>
inline void wgmma(float (&d)[N / 2], uint64_t a, uint64_t b, bool add) {
  __syncwarp();
  simt_product_later<N, T, kB>(d, b, add, [=] {
    SimtRows rows;
    const int row = static_cast<int>(threadIdx.x) / kWarp % 4 * 16 + lane() / 4;
    for (int h = 0; h < 2; ++h) {
      for (int k = 0; k < 16; ++k) rows.at[h][k] = simt_element<T>(a, kA, row + 8 * h, k);
    }
    return rows;
  });
}

template <int N, class T, Major kB>
inline void wgmma(float (&d)[N / 2], const uint32_t (&a)[4], uint64_t b, bool add) {
  SimtRows rows;
  const uint64_t* lanes = simt::meet(kFullMask, reinterpret_cast<uint64_t>(&a[0]));
  for (int t = 0; t < 4; ++t) {  // the four lanes that share these rows
    const auto* registers = reinterpret_cast<const uint32_t*>(lanes[lane() / 4 * 4 + t]);
    for (int i = 0; i < 4; ++i) {
      for (int c = 0; c < 2; ++c)
        rows.at[i % 2][i / 2 * 8 + 2 * t + c] = to_float(T{static_cast<uint16_t>(registers[i] >> (16 * c))});
    }
  }
  __syncwarp();  // until all have read, before anyone writes its registers again
  simt_product_later<N, T, kB>(d, b, add, [=] { return rows; });
}

}  // namespace gptcore::cuda
