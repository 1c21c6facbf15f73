// The products inside attention, over 32-bit units: an f32 value, or a pair of bf16 values that are adjacent
// in the summed dimension (what VDPBF16PS and the AMX tiles multiply).
//
//   C[m][n] (+)= sum_k A[m][k] * B[k][n]
//
// A is row-major with k contiguous. B is cut into panels of kLanes columns: unit k of panel p starts at
// data + p * panel + k * step. C is f32, row-major. Sums run over k in order for every element, whatever the
// sizes: a row's bits do not depend on its neighbours.
#pragma once

#include <cstdint>

#include "core/simd.h"

namespace gptcore {
namespace GPTCORE_ISA_NS {
namespace {

template <class Unit>
struct Panels {
  const Unit* data;
  int64_t step, panel;
};

// Plain f32 units; bf16 tensors are widened when packed.
struct F32Units {
  using Unit = float;
  static constexpr int kPerUnit = 1;

  static __attribute__((always_inline)) inline Vec multiply_add(Vec sum, const Unit* a, Vec b) {
    return splat(*a) * b + sum;
  }
};

#if defined(__AVX512BF16__)
// Pairs of bf16, multiplied into f32 by VDPBF16PS.
struct PairUnits {
  using Unit = uint32_t;
  static constexpr int kPerUnit = 2;

  static __attribute__((always_inline)) inline Vec multiply_add(Vec sum, const Unit* a, Vec b) {
    return (Vec)_mm512_dpbf16_ps((__m512)sum, (__m512bh)_mm512_set1_epi32(static_cast<int>(*a)), (__m512bh)b);
  }
};
#endif

// Four rows of A against up to kMaxPanels vectors of B. With 32 registers 4 x 6 sums, 6 of B and one of A
// fill them; with 16, 4 x 3 and 3. At least 12 independent sums cover the latency of 4 cycles on two ports.
constexpr int kProductRows = 4;
constexpr int kMaxPanels = kLanes == 16 ? 6 : 3;

template <class Units, int kPanels>
__attribute__((noinline)) void product_panels(const typename Units::Unit* a, int64_t a_row,
                                              const Panels<typename Units::Unit>& b, float* c, int64_t c_row,
                                              int64_t rows, int64_t depth, bool accumulate) {
  for (int64_t m = 0; m < rows; m += kProductRows, a += kProductRows * a_row, c += kProductRows * c_row) {
    Vec sum[kProductRows][kPanels];
    for (int i = 0; i < kProductRows; ++i) {
      for (int p = 0; p < kPanels; ++p) sum[i][p] = accumulate ? load(c + i * c_row + p * kLanes) : Vec{};
    }
    const typename Units::Unit* bk = b.data;
    const typename Units::Unit *a0 = a, *a1 = a + a_row, *a2 = a + 2 * a_row, *a3 = a + 3 * a_row;
    for (int64_t k = 0; k < depth; ++k, bk += b.step) {
      Vec column[kPanels];
      for (int p = 0; p < kPanels; ++p) column[p] = load(reinterpret_cast<const float*>(bk + p * b.panel));
      for (int p = 0; p < kPanels; ++p) sum[0][p] = Units::multiply_add(sum[0][p], a0 + k, column[p]);
      for (int p = 0; p < kPanels; ++p) sum[1][p] = Units::multiply_add(sum[1][p], a1 + k, column[p]);
      for (int p = 0; p < kPanels; ++p) sum[2][p] = Units::multiply_add(sum[2][p], a2 + k, column[p]);
      for (int p = 0; p < kPanels; ++p) sum[3][p] = Units::multiply_add(sum[3][p], a3 + k, column[p]);
    }
    for (int i = 0; i < kProductRows; ++i) {
      for (int p = 0; p < kPanels; ++p) store(c + i * c_row + p * kLanes, sum[i][p]);
    }
  }
}

// rows: a multiple of kProductRows; columns: of kLanes. Columns are spread evenly over the calls.
template <class Units>
void vector_product(const typename Units::Unit* a, int64_t a_row, Panels<typename Units::Unit> b, float* c,
                    int64_t c_row, int64_t rows, int64_t columns, int64_t depth, bool accumulate) {
  int64_t left = columns / kLanes;
  for (int64_t calls = (left + kMaxPanels - 1) / kMaxPanels; calls > 0; --calls) {
    const int64_t panels = (left + calls - 1) / calls;
    switch (panels) {
      case 1:
        product_panels<Units, 1>(a, a_row, b, c, c_row, rows, depth, accumulate);
        break;
      case 2:
        product_panels<Units, 2>(a, a_row, b, c, c_row, rows, depth, accumulate);
        break;
      case 3:
        product_panels<Units, 3>(a, a_row, b, c, c_row, rows, depth, accumulate);
        break;
      default:
        if constexpr (kMaxPanels > 3) {
          if (panels == 4) product_panels<Units, 4>(a, a_row, b, c, c_row, rows, depth, accumulate);
          if (panels == 5) product_panels<Units, 5>(a, a_row, b, c, c_row, rows, depth, accumulate);
          if (panels == 6) product_panels<Units, 6>(a, a_row, b, c, c_row, rows, depth, accumulate);
        }
    }
    left -= panels;
    b.data += panels * b.panel;
    c += panels * kLanes;
  }
}

}  // namespace
}  // namespace GPTCORE_ISA_NS
}  // namespace gptcore
