// A block of an expert's product through packed operands, for every ISA and layout; and sums over rows.
#pragma once

#include "core/arena.h"
#include "core/gemm_tile.h"
#include "kernels/grouped_linear/grouped_linear_body.h"

namespace gptcore {
namespace GPTCORE_ISA_NS {
namespace {

// Depth of a pass: the rows of a block, packed, are at most half of the smallest L2 we aim at (256 rows of 512 f32).
constexpr int64_t kPassSteps = 32;
constexpr int64_t kBlockRows = 256;
// Columns packed at a time, in whole panels of three; and of a block, whose f32 sums wait in L2 between passes.
constexpr int64_t kChunkColumns = 192;
constexpr int64_t kBlockColumns = 4 * kChunkColumns;
constexpr int64_t kSumStride = kChunkColumns + kGroup;  // rows of sums do not lie a multiple of 4 KiB apart

template <class T>
GPTCORE_INLINE void put_row(const GroupProduct& p, const float* sums, T* out, int64_t column,
                            int64_t columns) {
  for_lanes(columns, [&](int64_t j, int64_t n) {
    Vec value = load_some(sums + j, n);
    if (p.bias && p.f32_bias) value += load_some(static_cast<const float*>(p.bias) + column + j, n);
    if (p.bias && !p.f32_bias) value += load_some(static_cast<const bf16*>(p.bias) + column + j, n);
    if (p.accumulate) value += load_some(out + j, n);
    store_some(out + j, value, n);
  });
}

static void put_sums(const GroupProduct& p, const float* sums, const GroupBlock& at) {
  for (int64_t r = 0; r < at.rows; ++r) {
    const int64_t offset = (at.row + r) * p.out_stride + at.column;
    const float* line = sums + r * kSumStride;
    if (p.f32_out) {
      put_row(p, line, static_cast<float*>(p.out) + offset, at.column, at.columns);
    } else {
      put_row(p, line, static_cast<bf16*>(p.out) + offset, at.column, at.columns);
    }
  }
}

inline Lines lines_of(const void* data, const GroupProduct& p, int64_t stride, bool depth_lines,
                      int64_t across) {
  return {data, p.dtype, stride, nullptr, depth_lines ? across : p.k, depth_lines ? p.k : across};
}

inline GroupCut packed_cut(const GroupProduct&) { return {kBlockRows, kBlockColumns, kChunkColumns}; }

template <class Policy>
void packed_block(const GroupProduct& p, const GroupBlock& block) {
  using P = typename Policy::P;
  const Lines a = lines_of(p.a, p, p.a_stride, p.a_depth_lines, p.m);
  const Lines b = lines_of(p.b, p, p.b_stride, p.b_depth_lines, p.n);
  const int64_t all_steps = ceil_div(p.k, kStepDepth<P>), most = smaller(kPassSteps, all_steps);
  const int64_t groups = ceil_div(block.rows, kGroup), chunk_floats = groups * kGroup * kSumStride;
  const int64_t kept = all_steps > most ? ceil_div(block.columns, kChunkColumns) : 1;
  const Scratch rows(static_cast<size_t>(groups * most * kStepBytes));
  const Scratch columns(static_cast<size_t>(packed_bytes(kChunkColumns, most)));
  const Scratch sums(static_cast<size_t>(kept * chunk_floats) * sizeof(float));
  [[maybe_unused]] const typename Policy::Scope scope;
  for (int64_t step = 0; step == 0 || step < all_steps; step += most) {
    const int64_t steps = smaller(most, all_steps - step), stride = steps * kStepBytes;
    const int64_t depth = step * kStepDepth<P>;
    for (int64_t g = 0; g < groups; ++g) {
      pack_a<P>(a, p.a_depth_lines, block.row + g * kGroup, depth, steps, rows.as<char>() + g * stride);
    }
    for (int64_t j = 0; j < block.columns; j += kChunkColumns) {
      const int64_t width = smaller(kChunkColumns, block.columns - j), panels = ceil_div(width, kGroup);
      for (int64_t q = 0; q < panels; ++q) {
        pack_b<P>(b, p.b_depth_lines, block.column + j + q * kGroup, depth, steps,
                  columns.as<char>() + q * stride);
      }
      float* c = sums.as<float>() + (kept > 1 ? j / kChunkColumns * chunk_floats : 0);
      multiply_block<Policy>(rows.as<char>(), stride, groups, columns.as<char>(), stride, panels, steps, c,
                             kSumStride, step > 0);
      if (step + steps >= all_steps) {
        put_sums(p, c, {block.expert, block.row, block.rows, block.column + j, width});
      }
    }
    if (steps == 0) break;
  }
}

// One chain of sums for each column, over the rows in order.
template <class T>
GPTCORE_INLINE void sum_rows(const ColumnSums& x, float* sums) {
  const T* in = static_cast<const T*>(x.in);
  for (int64_t r = 0; r < x.rows; r += 4) {
    const int64_t count = smaller(4, x.rows - r);
    for_lanes(x.columns, [&](int64_t j, int64_t n) {
      Vec sum = r ? load_some(sums + j, n) : Vec{};
      for (int64_t i = 0; i < count; ++i) sum += load_some(in + (r + i) * x.stride + j, n);
      store_some(sums + j, sum, n);
    });
  }
}

inline void column_sums(const ColumnSums& x) {
  const Scratch room(static_cast<size_t>(x.columns) * sizeof(float));
  float* sums = room.as<float>();
  __builtin_memset(sums, 0, static_cast<size_t>(x.columns) * sizeof(float));
  if (x.f32_in) {
    sum_rows<float>(x, sums);
  } else {
    sum_rows<bf16>(x, sums);
  }
  for_lanes(x.columns, [&](int64_t j, int64_t n) {
    if (x.f32_out) {
      store_some(static_cast<float*>(x.out) + j, load_some(sums + j, n), n);
    } else {
      store_some(static_cast<bf16*>(x.out) + j, load_some(sums + j, n), n);
    }
  });
}

}  // namespace
}  // namespace GPTCORE_ISA_NS
}  // namespace gptcore
