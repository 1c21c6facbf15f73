// The AMX policy of gemm_tile.h: 32 x 32 of C in four tiles, two tiles of A, two of B. Only *_amx.cpp include
// this.
#pragma once

#include "core/amx.h"
#include "core/gemm_tile.h"

namespace gptcore {
namespace GPTCORE_ISA_NS {

template <int kGroupCount, int kPanelCount>
static inline void multiply_tiles(const char* a, int64_t a_stride, const char* b, int64_t b_stride,
                                  int64_t steps, float* c, int64_t ldc, bool accumulate) {
  const size_t row_bytes = static_cast<size_t>(ldc) * sizeof(float);
  tile_fence();
  if (accumulate) {
    _tile_loadd(0, c, row_bytes);
    if constexpr (kPanelCount == 2) _tile_loadd(1, c + 16, row_bytes);
    if constexpr (kGroupCount == 2) _tile_loadd(2, c + 16 * ldc, row_bytes);
    if constexpr (kGroupCount == 2 && kPanelCount == 2) _tile_loadd(3, c + 16 * ldc + 16, row_bytes);
  } else {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
  }
  for (int64_t step = 0; step < steps; ++step, a += kStepBytes, b += kStepBytes) {
    _tile_loadd(6, b, kLine);
    _tile_loadd(4, a, kLine);
    _tile_dpbf16ps(0, 4, 6);
    if constexpr (kPanelCount == 2) {
      _tile_loadd(7, b + b_stride, kLine);
      _tile_dpbf16ps(1, 4, 7);
    }
    if constexpr (kGroupCount == 2) {
      _tile_loadd(5, a + a_stride, kLine);
      _tile_dpbf16ps(2, 5, 6);
      if constexpr (kPanelCount == 2) _tile_dpbf16ps(3, 5, 7);
    }
  }
  _tile_stored(0, c, row_bytes);
  if constexpr (kPanelCount == 2) _tile_stored(1, c + 16, row_bytes);
  if constexpr (kGroupCount == 2) _tile_stored(2, c + 16 * ldc, row_bytes);
  if constexpr (kGroupCount == 2 && kPanelCount == 2) _tile_stored(3, c + 16 * ldc + 16, row_bytes);
}

namespace {

struct AmxPolicy {
  using P = bf16;
  static constexpr int kGroups = 2, kPanels = 2, kBlockSteps = 12;
  using Scope = TileScope;

  static void multiply(const char* a, int64_t a_stride, int64_t groups, const char* b, int64_t b_stride,
                       int64_t panels, int64_t steps, float* c, int64_t ldc, bool accumulate) {
    if (groups == 2 && panels == 2) {
      multiply_tiles<2, 2>(a, a_stride, b, b_stride, steps, c, ldc, accumulate);
    } else if (groups == 2) {
      multiply_tiles<2, 1>(a, a_stride, b, b_stride, steps, c, ldc, accumulate);
    } else if (panels == 2) {
      multiply_tiles<1, 2>(a, a_stride, b, b_stride, steps, c, ldc, accumulate);
    } else {
      multiply_tiles<1, 1>(a, a_stride, b, b_stride, steps, c, ldc, accumulate);
    }
  }
};

}  // namespace
}  // namespace GPTCORE_ISA_NS
}  // namespace gptcore
