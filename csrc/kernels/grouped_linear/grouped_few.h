// A block of y = x weight^T in f32 for an expert of few rows, as in decoding: the weight is read where it lies, since
// packing it would take as long as the products. Its elements are broadcast against the rows, packed side by side as a
// panel, so that an element of y is the chain over the depth that packed blocks make.
#pragma once

#include "kernels/grouped_linear/grouped_packed.h"

namespace gptcore {
namespace GPTCORE_ISA_NS {
namespace {

constexpr int64_t kFewRows = kGroup;
// Packing the rows costs about what 8 columns do, so a block has more of them. At most 16 times the least: what the cut
// into more blocks for all threads comes down to.
constexpr int64_t kFewLeastColumns = 32, kFewMostColumns = 512;
// Columns times depth up to which one thread is done (25 us) about when a second one has woken.
constexpr int64_t kFewSerial = 1 << 17;
constexpr int64_t kFewChunkColumns = 96;
// How far ahead of the products the weight's lines are asked for: the processor's prefetching forgets so many streams.
constexpr int64_t kFewAhead = 256;

GPTCORE_INLINE bool few_rows(const GroupProduct& p) {
  return p.dtype == DType::f32 && p.a_depth_lines && p.b_depth_lines && p.m <= kFewRows;
}

GPTCORE_INLINE GroupCut few_cut(const GroupProduct& p) {
  const bool one_block = p.n * p.k <= kFewSerial;
  return {kFewRows, kFewMostColumns, one_block ? p.n : kFewLeastColumns};
}

// Sums of kColumns lines of the weight against the panel, a line of sums for each.
template <int kColumns>
static inline void few_columns(const float* weight, int64_t stride, const char* panel, int64_t depth,
                               float* sums) {
  Vec sum[kColumns][kVecsPerLine] = {};
  const auto step = [&](int64_t k) __attribute__((always_inline)) {
    Vec line[kVecsPerLine];
#pragma GCC unroll 4
    for (int v = 0; v < kVecsPerLine; ++v) line[v] = load_words(panel + k * kLine + v * kLanes * 4);
#pragma GCC unroll 8
    for (int c = 0; c < kColumns; ++c) {
#pragma GCC unroll 4
      for (int v = 0; v < kVecsPerLine; ++v) sum[c][v] = sum[c][v] + weight[c * stride + k] * line[v];
    }
  };
  int64_t k = 0;
  for (; k + kGroup <= depth; k += kGroup) {
    for (int c = 0; c < kColumns; ++c) __builtin_prefetch(weight + c * stride + k + kFewAhead, 0, 3);
#pragma GCC unroll 4
    for (int i = 0; i < kGroup; ++i) step(k + i);
  }
  const bool padded = k < depth;
  for (; k < depth; ++k) step(k);
  for (int c = 0; c < kColumns; ++c) {
    for (int v = 0; v < kVecsPerLine; ++v) {
      // Packed depth is padded with zeros, which make +0 of -0.
      store(sums + c * kTransposedSumStride + v * kLanes, padded ? sum[c][v] + Vec{} : sum[c][v]);
    }
  }
}

static void few_block(const GroupProduct& p, const GroupBlock& block) {
  const int64_t steps = ceil_div(p.k, kStepDepth<float>);
  const Scratch panel(static_cast<size_t>(steps * kStepBytes));
  const Scratch scratch(static_cast<size_t>(kFewChunkColumns * kTransposedSumStride) * sizeof(float));
  float* sums = scratch.as<float>();
  pack_b<float>(lines_of(p.a, p, p.a_stride, true, p.m), true, block.row, 0, steps, panel.as<char>());
  for (int64_t j = 0; j < block.columns; j += kFewChunkColumns) {
    const int64_t columns = smaller(kFewChunkColumns, block.columns - j);
    const float* weight = static_cast<const float*>(p.b) + (block.column + j) * p.b_stride;
    int64_t c = 0;
    for (; c + kMicroRows <= columns; c += kMicroRows) {
      few_columns<kMicroRows>(weight + c * p.b_stride, p.b_stride, panel.as<char>(), p.k,
                              sums + c * kTransposedSumStride);
    }
    for (; c < columns; ++c) {
      few_columns<1>(weight + c * p.b_stride, p.b_stride, panel.as<char>(), p.k,
                     sums + c * kTransposedSumStride);
    }
    put_transposed(p, sums, {block.expert, block.row, block.rows, block.column + j, columns});
  }
  if (p.past_caches) stream_fence();
}

static GroupCut f32_cut(const GroupProduct& p) {
  return few_rows(p) ? few_cut(p) : packed_cut<PlainPolicy>(p);
}

static void f32_block(const GroupProduct& p, const GroupBlock& block) {
  few_rows(p) ? few_block(p, block) : packed_block<PlainPolicy>(p, block);
}

}  // namespace
}  // namespace GPTCORE_ISA_NS
}  // namespace gptcore
