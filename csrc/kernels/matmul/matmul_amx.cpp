#include "core/arena.h"
#include "core/gemm_tile_amx.h"
#include "core/parallel.h"
#include "kernels/matmul/matmul_blocked_amx.h"
#include "kernels/matmul/matmul_few_across_amx.h"
#include "kernels/matmul/matmul_one_row.h"

namespace gptcore {
namespace GPTCORE_ISA_NS {
namespace {

constexpr int64_t kTaskBytes = 1 << 17;

// Where a group of 16 rows of b lies, seen as the A operand: steps[0 .. whole) at rows + 64 * step bytes with
// the matrix's own stride, and what is left of the depth, if any, packed at `rest`.
struct Group {
  const char* rows;
  size_t stride;
  int64_t step_bytes;
  const char* rest;
};

// Tiles 0-3 hold out^T: a group by up to four panels of rows of a, or two groups by two panels.
template <int kGroups, int kPanels>
GPTCORE_INLINE void multiply_groups(const Group* group, const char* panel, int64_t panel_stride,
                                    int64_t whole, int64_t steps) {
  tile_fence();
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  for (int64_t s = 0; s < steps; ++s, panel += kStepBytes) {
    const bool inside = s < whole;
    const char* first = inside ? group[0].rows + s * group[0].step_bytes : group[0].rest;
    _tile_loadd(4, first, inside ? group[0].stride : kLine);
    if (inside) {
      for (int r = 0; r < 16; ++r) __builtin_prefetch(first + (16 * kGroups + r) * group[0].stride);
    }
    if constexpr (kGroups == 2) {
      const char* second = inside ? group[1].rows + s * group[1].step_bytes : group[1].rest;
      _tile_loadd(5, second, inside ? group[1].stride : kLine);
      if (inside) {
        for (int r = 0; r < 16; ++r) __builtin_prefetch(second + (32 + r) * group[1].stride);
      }
    }
    _tile_loadd(6, panel, kLine);
    _tile_dpbf16ps(0, 4, 6);
    if constexpr (kGroups == 2) _tile_dpbf16ps(2, 5, 6);
    if constexpr (kPanels >= 2) {
      _tile_loadd(7, panel + panel_stride, kLine);
      _tile_dpbf16ps(1, 4, 7);
      if constexpr (kGroups == 2) _tile_dpbf16ps(3, 5, 7);
    }
    if constexpr (kPanels >= 3) {
      _tile_loadd(6, panel + 2 * panel_stride, kLine);
      _tile_dpbf16ps(2, 4, 6);
    }
    if constexpr (kPanels >= 4) {
      _tile_loadd(7, panel + 3 * panel_stride, kLine);
      _tile_dpbf16ps(3, 4, 7);
    }
  }
}

// Writes a tile (16 rows of b by 16 rows of a) to out[m .., n ..].
GPTCORE_INLINE void put_tile(const MatmulArgs& x, Line32* tile, int64_t m, int64_t n) {
  transpose_words(tile);
  const int64_t rows = smaller(16, x.m - m), lanes = smaller(16, x.n - n);
  for (int64_t r = 0; r < rows; ++r) {
    const int64_t at = (m + r) * x.out_stride + n;
    Vec value = (Vec)tile[r];
    if (x.bias) value += load_n(x.bias + n, lanes);
    if (!x.f32_out) {
      store_n(static_cast<bf16*>(x.out) + at, value, lanes);
      continue;
    }
    float* out = static_cast<float*>(x.out) + at;
    if (x.accumulate) value += load_n(out, lanes);
    store_n(out, value, lanes);
  }
}

// The few rows of a become the B operand, padded to whole panels of 16, so one row costs and gives what
// sixteen do; b is read in place, once. AMX multiplies faster than memory delivers up to all 64 rows.
void few_rows(const MatmulArgs& x) {
  const Lines a{x.a, DType::bf16, x.a_stride, nullptr, x.m, x.k},
      b{x.b, DType::bf16, x.b_stride, nullptr, x.n, x.k};
  const int64_t steps = ceil_div(x.k, 32), whole = x.k / 32, panels = ceil_div(x.m, kGroup);
  const int64_t stride = steps * kStepBytes;
  const Scratch packed(static_cast<size_t>(panels * stride));
  for (int64_t p = 0; p < panels; ++p) {
    pack_b<bf16>(a, true, p * kGroup, 0, steps, packed.as<char>() + p * stride);
  }
  const int64_t at_once = panels <= 2 ? 2 : 1;
  const int64_t grain = ceil_div(kTaskBytes, (x.k + 1) * 2 * 32) * 2;  // groups
  const int64_t groups = ceil_div(x.n, kGroup);
  parallel_for(ceil_div(groups, grain), [&](int64_t task, int) {
    const Scratch spare(static_cast<size_t>(2 * stride + 2 * kStepBytes));
    alignas(64) Line32 tile[16];
    const TileScope scope;
    const int64_t end = smaller((task + 1) * grain, groups);
    for (int64_t g = task * grain; g < end; g += at_once) {
      const int64_t count = smaller(at_once, end - g);
      Group group[2];
      for (int64_t i = 0; i < count; ++i) {
        const int64_t row = (g + i) * kGroup;
        char* room = spare.as<char>() + i * (stride + kStepBytes);
        if (row + kGroup <= x.n) {
          const char* rows = static_cast<const char*>(x.b) + row * x.b_stride * 2;
          group[i] = {rows, static_cast<size_t>(x.b_stride) * 2, kLine, room};
          if (whole < steps) pack_a<bf16>(b, true, row, whole * 32, 1, room);
        } else {
          pack_a<bf16>(b, true, row, 0, steps, room);
          group[i] = {room, kLine, kStepBytes, room + whole * kStepBytes};
        }
      }
      const char* panel = packed.as<char>();
      if (count == 2 && panels == 2) multiply_groups<2, 2>(group, panel, stride, whole, steps);
      if (count == 2 && panels == 1) multiply_groups<2, 1>(group, panel, stride, whole, steps);
      if (count == 1 && panels == 1) multiply_groups<1, 1>(group, panel, stride, whole, steps);
      if (count == 1 && panels == 2) multiply_groups<1, 2>(group, panel, stride, whole, steps);
      if (count == 1 && panels == 3) multiply_groups<1, 3>(group, panel, stride, whole, steps);
      if (count == 1 && panels == 4) multiply_groups<1, 4>(group, panel, stride, whole, steps);
      const int64_t n = g * kGroup;
      _tile_stored(0, tile, kLine);
      put_tile(x, tile, 0, n);
      if (panels >= 2) {
        _tile_stored(1, tile, kLine);
        put_tile(x, tile, 16, n);
      }
      if (panels >= 3 || count == 2) {
        _tile_stored(2, tile, kLine);
        put_tile(x, tile, count == 2 ? 0 : 32, count == 2 ? n + 16 : n);
      }
      if (panels >= 4 || (count == 2 && panels == 2)) {
        _tile_stored(3, tile, kLine);
        put_tile(x, tile, count == 2 ? 16 : 48, count == 2 ? n + 16 : n);
      }
    }
  });
}

void few_rows_across_amx(const MatmulArgs& x) {
  x.m <= kTileRows ? few_rows_across_tiles(x) : blocked_product(x);
}

}  // namespace

extern const MatmulBodies matmul_bf16_bodies;
const MatmulBodies matmul_bf16_bodies = {few_rows, few_rows_across_amx, one_row<bf16>, blocked_product};

}  // namespace GPTCORE_ISA_NS
}  // namespace gptcore
