// A block of an expert's product through packed operands, for every ISA and layout.
//
// y = x weight^T, whose operands both lie along the depth, is made as its transpose: the weight is the A operand, whose
// packing is a plain copy, and what has to be transposed is x and y, smaller than the weights where experts are many.
#pragma once

#include "core/arena.h"
#include "core/gemm_tile.h"
#include "core/stream.h"
#include "core/transpose.h"
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
constexpr int64_t kTransposedSumStride = kBlockRows + kGroup;

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

// The sums are the transpose's: a line for each column.
static void put_transposed(const GroupProduct& p, const float* sums, const GroupBlock& at) {
  alignas(64) float lines[kLanes * kSumStride];
  for (int64_t r = 0; r < at.rows; r += kLanes) {
    for (int64_t j = 0; j < at.columns; j += kLanes) {
      Vec tile[kLanes];
      for (int i = 0; i < kLanes; ++i) tile[i] = load(sums + (j + i) * kTransposedSumStride + r);
      transpose(tile);
      for (int i = 0; i < kLanes; ++i) store(lines + i * kSumStride + j, tile[i]);
    }
    put_sums(p, lines, {at.expert, at.row + r, smaller(kLanes, at.rows - r), at.column, at.columns});
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

// Rows of a block against its columns, a chunk of these at a time.
template <class Policy>
struct PackedBlock {
  using P = typename Policy::P;

  const GroupProduct& p;
  const GroupBlock& block;
  const Lines a, b;
  const bool transposed;
  const int64_t all_steps, most_steps, groups;  // groups of 16 rows

  PackedBlock(const GroupProduct& product, const GroupBlock& at)
      : p(product),
        block(at),
        a(lines_of(product.a, product, product.a_stride, product.a_depth_lines, product.m)),
        b(lines_of(product.b, product, product.b_stride, product.b_depth_lines, product.n)),
        transposed(product.a_depth_lines && product.b_depth_lines),
        all_steps(ceil_div(product.k, kStepDepth<P>)),
        most_steps(ceil_div(all_steps, passes_of<P>(product))),
        groups(ceil_div(at.rows, kGroup)) {}

  int64_t chunk_columns() const { return transposed ? kChunkColumns / 2 : kChunkColumns; }
  int64_t chunk_floats() const {
    return transposed ? chunk_columns() * kTransposedSumStride : groups * kGroup * kSumStride;
  }

  void pack_rows(int64_t step, int64_t steps, char* out) const {
    const int64_t depth = step * kStepDepth<P>;
    for (int64_t g = 0; g < groups; ++g, out += steps * kStepBytes) {
      if (transposed) {
        pack_b<P>(a, true, block.row + g * kGroup, depth, steps, out);
      } else {
        pack_a<P>(a, p.a_depth_lines, block.row + g * kGroup, depth, steps, out);
      }
    }
  }

  void pack_columns(int64_t j, int64_t width, int64_t step, int64_t steps, char* out) const {
    const int64_t depth = step * kStepDepth<P>;
    for (int64_t q = 0; q < width; q += kGroup, out += steps * kStepBytes) {
      if (transposed) {
        pack_a<P>(b, true, block.column + j + q, depth, steps, out);
      } else {
        pack_b<P>(b, p.b_depth_lines, block.column + j + q, depth, steps, out);
      }
    }
  }

  // What comes after `width` columns at j of the pass: the block's next columns or its first ones of the next pass.
  Fetch fetch_after(int64_t j, int64_t width, int64_t step, int64_t steps, int64_t turns) const {
    const bool last = j + width >= block.columns;
    const int64_t column = last ? 0 : j + width, from = (last ? step + steps : step) * kStepDepth<P>;
    if (from >= p.k) return {};
    return fetch_of(p, block.column + column, smaller(chunk_columns(), block.columns - column), from,
                    smaller(steps * kStepDepth<P>, p.k - from), turns);
  }

  // Steps [step, step + steps) of the chunk at j.
  void chunk(int64_t j, int64_t step, int64_t steps, const char* rows, char* columns, float* sums) const {
    const int64_t width = smaller(chunk_columns(), block.columns - j), stride = steps * kStepBytes;
    pack_columns(j, width, step, steps, columns);
    const int64_t across = ceil_div(width, kGroup);
    const int64_t down = transposed ? across : groups, panels = transposed ? groups : across;
    const int64_t turns = down * ceil_div(steps, Policy::kBlockSteps) * ceil_div(panels, Policy::kPanels);
    Fetch next = fetch_after(j, width, step, steps, turns);
    multiply_block<Policy>(transposed ? columns : rows, stride, down, transposed ? rows : columns, stride,
                           panels, steps, sums, transposed ? kTransposedSumStride : kSumStride, step > 0,
                           [&] { fetch_some(next); });
    if (step + steps < all_steps) return;
    const GroupBlock place{block.expert, block.row, block.rows, block.column + j, width};
    if (transposed) {
      put_transposed(p, sums, place);
    } else {
      put_sums(p, sums, place);
    }
  }

  void run() const {
    const bool waiting = all_steps > most_steps;
    const int64_t kept = waiting ? ceil_div(block.columns, chunk_columns()) : 1;
    const Scratch rows(static_cast<size_t>(groups * most_steps * kStepBytes));
    const Scratch columns(static_cast<size_t>(packed_bytes(chunk_columns(), most_steps)));
    const Scratch sums(static_cast<size_t>(kept * chunk_floats()) * sizeof(float));
    [[maybe_unused]] const typename Policy::Scope scope;
    for (int64_t step = 0; step == 0 || step < all_steps; step += most_steps) {
      const int64_t steps = smaller(most_steps, all_steps - step);
      pack_rows(step, steps, rows.as<char>());
      for (int64_t j = 0; j < block.columns; j += chunk_columns()) {
        chunk(j, step, steps, rows.as<char>(), columns.as<char>(),
              sums.as<float>() + (waiting ? j / chunk_columns() * chunk_floats() : 0));
      }
      if (steps == 0) break;
    }
    if (p.past_caches) stream_fence();
  }
};

template <class Policy>
void packed_block(const GroupProduct& p, const GroupBlock& block) {
  PackedBlock<Policy>(p, block).run();
}

}  // namespace
}  // namespace GPTCORE_ISA_NS
}  // namespace gptcore
