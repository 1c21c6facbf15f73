// Few rows times a bf16 matrix whose rows run across, on AMX: out[m,n] = sum_k a[m,k] b[k,n] for up to 16 rows.
// A thread goes down the whole depth of a strip of 96 columns with its sums in six tiles. Each step of 32 rows of b is
// interleaved into L1 just before it is multiplied, so that nothing but b comes from further away than L1, and lines of
// the rows to come are under way meanwhile. Included by matmul_amx.cpp only.
#pragma once

#include "core/arena.h"
#include "core/gemm_pack_amx.h"
#include "core/gemm_tile_amx.h"
#include "kernels/matmul/matmul_few_across.h"

namespace gptcore {
namespace GPTCORE_ISA_NS {
namespace {

// Three lines of 32 columns: wider strips need more tiles than there are.
constexpr int64_t kAcrossColumns = 96;
constexpr int kAcrossTiles = kAcrossColumns / kTileCols;
constexpr int64_t kRowsAhead = 32;

// A step's tiles of b, in L1.
struct alignas(64) StepTiles {
  Line32 tile[kAcrossTiles][kTileRows];
};

// A step of b whole in depth and columns: rows in pairs, fetching the lines `ahead` bytes behind.
GPTCORE_INLINE void interleave_step(const char* b, int64_t stride, int64_t ahead, StepTiles& out) {
  for (int pair = 0; pair < kTileRows; ++pair, b += 2 * stride) {
#pragma GCC unroll 3
    for (int line = 0; line < kAcrossTiles / 2; ++line) {
      const char *low = b + line * kLine, *high = low + stride;
      __builtin_prefetch(low + ahead, 0, 2);
      __builtin_prefetch(high + ahead, 0, 2);
      for (int half = 0; half < 2; ++half) {
        out.tile[2 * line + half][pair] =
            interleave(*reinterpret_cast<const Half16Unaligned*>(low + half * kLine / 2),
                       *reinterpret_cast<const Half16Unaligned*>(high + half * kLine / 2));
      }
    }
  }
}

// The same of `rows` rows and `columns` columns, the rest zeros.
static void interleave_edge(const char* b, int64_t stride, int64_t rows, int64_t columns, StepTiles& out) {
  alignas(64) char edge[2 * kTileRows * kAcrossColumns * 2] = {};
  for (int64_t r = 0; r < rows; ++r) {
    __builtin_memcpy(edge + r * kAcrossColumns * 2, b + r * stride, static_cast<size_t>(columns) * 2);
  }
  interleave_step(edge, kAcrossColumns * 2, 0, out);
}

// Tile 6 is a's step, tile 7 one of b's after the other.
GPTCORE_INLINE void multiply_step(const char* a, const StepTiles& b) {
  tile_fence();
  _tile_loadd(6, a, kLine);
  _tile_loadd(7, b.tile[0], kLine);
  _tile_dpbf16ps(0, 6, 7);
  _tile_loadd(7, b.tile[1], kLine);
  _tile_dpbf16ps(1, 6, 7);
  _tile_loadd(7, b.tile[2], kLine);
  _tile_dpbf16ps(2, 6, 7);
  _tile_loadd(7, b.tile[3], kLine);
  _tile_dpbf16ps(3, 6, 7);
  _tile_loadd(7, b.tile[4], kLine);
  _tile_dpbf16ps(4, 6, 7);
  _tile_loadd(7, b.tile[5], kLine);
  _tile_dpbf16ps(5, 6, 7);
  tile_fence();
}

GPTCORE_INLINE void zero_sums() {
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  _tile_zero(4);
  _tile_zero(5);
}

GPTCORE_INLINE void store_sums(float* sums) {
  constexpr size_t stride = kStripColumns * sizeof(float);
  _tile_stored(0, sums, stride);
  _tile_stored(1, sums + 16, stride);
  _tile_stored(2, sums + 32, stride);
  _tile_stored(3, sums + 48, stride);
  _tile_stored(4, sums + 64, stride);
  _tile_stored(5, sums + 80, stride);
  tile_fence();
}

// a: packed steps of 16 rows.
static void strip_across_tiles(const MatmulArgs& x, const char* a, int64_t first, StepTiles& tiles) {
  alignas(64) float sums[kTileRows * kStripColumns];
  const int64_t columns = smaller(kAcrossColumns, x.n - first), stride = x.b_stride * 2;
  const char* b = static_cast<const char*>(x.b) + first * 2;
  zero_sums();
  for (int64_t k = 0; k < x.k; k += kTileDepth, b += kTileDepth * stride, a += kStepBytes) {
    if (columns == kAcrossColumns && k + kTileDepth <= x.k) {
      interleave_step(b, stride, kRowsAhead * stride, tiles);
    } else {
      interleave_edge(b, stride, smaller(kTileDepth, x.k - k), columns, tiles);
    }
    multiply_step(a, tiles);
  }
  store_sums(sums);
  put_strip(x, first, columns, sums);
}

static void few_rows_across_tiles(const MatmulArgs& x) {
  const int64_t steps = ceil_div(x.k, kTileDepth);
  const Lines lines{x.a, DType::bf16, x.a_stride, nullptr, x.m, x.k};
  const Scratch packed(static_cast<size_t>(steps * kStepBytes));
  pack_a<bf16>(lines, true, 0, 0, steps, packed.as<char>());
  run_tasks(x, ceil_div(x.n, kAcrossColumns), [&](int64_t i) {
    StepTiles tiles;
    const TileScope scope(static_cast<int>(x.m));
    strip_across_tiles(x, packed.as<char>(), i * kAcrossColumns, tiles);
  });
}

}  // namespace
}  // namespace GPTCORE_ISA_NS
}  // namespace gptcore
