// A block of an expert's product through packed operands, for every ISA and layout.
#pragma once

#include "core/arena.h"
#include "core/gemm_tile.h"
#include "core/stream.h"
#include "kernels/grouped_linear/grouped_memory.h"

namespace gptcore {
namespace GPTCORE_ISA_NS {
namespace {

// Steps of depth of a pass: all of them up to 48 (768 KB of a block's rows, packed), else 24, which leaves room in L2
// for the sums that wait between passes.
constexpr int64_t kWholeSteps = 48, kPassSteps = 24;
constexpr int64_t kBlockRows = 256;
// Columns packed at a time, in whole panels of three; and of a block, which packs its rows anew.
constexpr int64_t kChunkColumns = 192;
constexpr int64_t kOnePassColumns = 1536, kWaitingColumns = 768;
constexpr int64_t kSumStride = kChunkColumns + kGroup;  // rows of sums do not lie a multiple of 4 KiB apart

template <class T>
GPTCORE_INLINE void put_row(const GroupProduct& p, const float* sums, T* out, int64_t column, int64_t columns,
                            [[maybe_unused]] bool streams) {
  for_lanes(columns, [&](int64_t j, int64_t n) {
    Vec value = load_some(sums + j, n);
    if (p.bias && p.f32_bias) value += load_some(static_cast<const float*>(p.bias) + column + j, n);
    if (p.bias && !p.f32_bias) value += load_some(static_cast<const bf16*>(p.bias) + column + j, n);
    if (p.accumulate) value += load_some(out + j, n);
    if constexpr (sizeof(T) == sizeof(float)) {
      if (streams && n == kLanes) {
        stream(out + j, value);
        return;
      }
    }
    store_some(out + j, value, n);
  });
}

static void put_sums(const GroupProduct& p, const float* sums, const GroupBlock& at) {
  const bool streams = whole_lines(p);
  for (int64_t r = 0; r < at.rows; ++r) {
    const int64_t offset = (at.row + r) * p.out_stride + at.column;
    const float* line = sums + r * kSumStride;
    if (p.f32_out) {
      put_row(p, line, static_cast<float*>(p.out) + offset, at.column, at.columns, streams);
    } else {
      put_row(p, line, static_cast<bf16*>(p.out) + offset, at.column, at.columns, streams);
    }
  }
}

inline Lines lines_of(const void* data, const GroupProduct& p, int64_t stride, bool depth_lines,
                      int64_t across) {
  return {data, p.dtype, stride, nullptr, depth_lines ? across : p.k, depth_lines ? p.k : across};
}

// Passes of about equal length.
template <class P>
GPTCORE_INLINE int64_t passes_of(const GroupProduct& p) {
  const int64_t steps = ceil_div(p.k, kStepDepth<P>);
  return steps <= kWholeSteps ? 1 : ceil_div(steps, kPassSteps);
}

template <class Policy>
GroupCut packed_cut(const GroupProduct& p) {
  const bool waiting = passes_of<typename Policy::P>(p) > 1;
  return {kBlockRows, waiting ? kWaitingColumns : kOnePassColumns, kChunkColumns};
}

// What comes after `width` columns at j of the pass: the block's next columns or its first ones of the next pass.
template <class Policy>
GPTCORE_INLINE Fetch fetch_after(const GroupProduct& p, const GroupBlock& block, int64_t j, int64_t width,
                                 int64_t depth, int64_t depths) {
  const bool last = j + width >= block.columns;
  const int64_t column = last ? 0 : j + width, from = last ? depth + depths : depth;
  if (from >= p.k) return {};
  const int64_t steps = ceil_div(depths, kStepDepth<typename Policy::P>);
  const int64_t turns = ceil_div(block.rows, kGroup) * ceil_div(steps, Policy::kBlockSteps) *
                        ceil_div(ceil_div(width, kGroup), Policy::kPanels);
  return fetch_of(p, block.column + column, smaller(kChunkColumns, block.columns - column), from,
                  smaller(depths, p.k - from), turns);
}

template <class Policy>
void packed_block(const GroupProduct& p, const GroupBlock& block) {
  using P = typename Policy::P;
  const Lines a = lines_of(p.a, p, p.a_stride, p.a_depth_lines, p.m);
  const Lines b = lines_of(p.b, p, p.b_stride, p.b_depth_lines, p.n);
  const int64_t all_steps = ceil_div(p.k, kStepDepth<P>), most = ceil_div(all_steps, passes_of<P>(p));
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
      Fetch next = fetch_after<Policy>(p, block, j, width, depth, steps * kStepDepth<P>);
      multiply_block<Policy>(rows.as<char>(), stride, groups, columns.as<char>(), stride, panels, steps, c,
                             kSumStride, step > 0, [&] { fetch_some(next); });
      if (step + steps >= all_steps) {
        put_sums(p, c, {block.expert, block.row, block.rows, block.column + j, width});
      }
    }
    if (steps == 0) break;
  }
  if (p.past_caches) stream_fence();
}

}  // namespace
}  // namespace GPTCORE_ISA_NS
}  // namespace gptcore
