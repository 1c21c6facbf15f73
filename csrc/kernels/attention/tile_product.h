// The products of product.h on AMX tiles. Units are pairs of bf16, so operands look exactly as for VDPBF16PS:
// 16 rows of 16 units of A, and 16 units of a panel of 16 columns of B, are one tile each.
#pragma once

#include "core/amx.h"
#include "kernels/attention/product.h"

namespace gptcore {
namespace GPTCORE_ISA_NS {
namespace {

// kRows x kColumns tiles of C (at most 2 x 2): tiles 0-3 are C, 4-5 of A, 6-7 of B. Each loaded tile of A and
// B is used twice, which keeps the tile unit busy at L1 speed.
template <int kRows, int kColumns>
GPTCORE_INLINE void tile_block(const uint32_t* a, int64_t a_row, const Panels<uint32_t>& b, float* c,
                               int64_t c_row, int64_t depth, bool accumulate) {
  const int64_t a_bytes = a_row * 4, b_bytes = b.step * 4, c_bytes = c_row * 4;
  float* c1 = c + 16 * c_row;
  if (accumulate) {
    _tile_loadd(0, c, c_bytes);
    if constexpr (kColumns > 1) _tile_loadd(1, c + 16, c_bytes);
    if constexpr (kRows > 1) _tile_loadd(2, c1, c_bytes);
    if constexpr (kRows > 1 && kColumns > 1) _tile_loadd(3, c1 + 16, c_bytes);
  } else {
    _tile_zero(0);
    if constexpr (kColumns > 1) _tile_zero(1);
    if constexpr (kRows > 1) _tile_zero(2);
    if constexpr (kRows > 1 && kColumns > 1) _tile_zero(3);
  }
  for (int64_t k = 0; k < depth; k += 16) {
    const uint32_t* bk = b.data + k * b.step;
    _tile_loadd(6, bk, b_bytes);
    _tile_loadd(4, a + k, a_bytes);
    _tile_dpbf16ps(0, 4, 6);
    if constexpr (kColumns > 1) {
      _tile_loadd(7, bk + b.panel, b_bytes);
      _tile_dpbf16ps(1, 4, 7);
    }
    if constexpr (kRows > 1) {
      _tile_loadd(5, a + 16 * a_row + k, a_bytes);
      _tile_dpbf16ps(2, 5, 6);
      if constexpr (kColumns > 1) _tile_dpbf16ps(3, 5, 7);
    }
  }
  _tile_stored(0, c, c_bytes);
  if constexpr (kColumns > 1) _tile_stored(1, c + 16, c_bytes);
  if constexpr (kRows > 1) _tile_stored(2, c1, c_bytes);
  if constexpr (kRows > 1 && kColumns > 1) _tile_stored(3, c1 + 16, c_bytes);
}

// rows, columns and depth (in units): multiples of 16. Not inlined: within a pass the loop counters would not
// find registers.
__attribute__((noinline)) void tile_product(const uint32_t* a, int64_t a_row, Panels<uint32_t> b, float* c,
                                            int64_t c_row, int64_t rows, int64_t columns, int64_t depth,
                                            bool accumulate) {
  tile_fence();
  for (int64_t n = 0; n < columns; n += 32, b.data += 2 * b.panel) {
    const bool two = n + 32 <= columns;
    for (int64_t m = 0; m < rows; m += 32) {
      const uint32_t* am = a + m * a_row;
      float* cm = c + m * c_row + n;
      if (m + 32 <= rows) {
        if (two) {
          tile_block<2, 2>(am, a_row, b, cm, c_row, depth, accumulate);
        } else {
          tile_block<2, 1>(am, a_row, b, cm, c_row, depth, accumulate);
        }
      } else if (two) {
        tile_block<1, 2>(am, a_row, b, cm, c_row, depth, accumulate);
      } else {
        tile_block<1, 1>(am, a_row, b, cm, c_row, depth, accumulate);
      }
    }
  }
}

}  // namespace
}  // namespace GPTCORE_ISA_NS
}  // namespace gptcore
