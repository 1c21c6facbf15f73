// One row times a matrix whose rows run across: out[n] = sum_k a[k] b[k,n], as a sum over rows (a bias gradient) is.
// Rows of b are read once, as they lie, eight at a time into running sums that stay in L1; included by
// matmul_cpu.cpp and matmul_amx.cpp.
#pragma once

#include "core/arena.h"
#include "core/gemm_tile.h"
#include "core/row_blocks.h"
#include "kernels/matmul/matmul_body.h"

namespace gptcore {
namespace GPTCORE_ISA_NS {
namespace {

constexpr int kRowsAtOnce = 8;

// sums[n] += the kRows products of column n in turn; `first` starts from zero.
template <class T, int kRows>
GPTCORE_INLINE void add_rows(const T* b, int64_t stride, const float* factors, float* sums, int64_t columns,
                             bool first) {
  for_lanes(columns, [&](int64_t n, int64_t lanes) {
    Vec sum = first ? Vec{} : load_some(sums + n, lanes);
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
      sum += factors[r] * load_some(b + r * stride + n, lanes);
      __builtin_prefetch(b + (r + kRows) * stride + n);  // the processor's own ends with each short row
    }
    store_some(sums + n, sum, lanes);
  });
}

GPTCORE_INLINE float scalar_of(float x) { return x; }
GPTCORE_INLINE float scalar_of(bf16 x) { return widen(x); }

template <class T>
void one_row(const MatmulArgs& x) {
  const T* a = static_cast<const T*>(x.a);
  const T* b = static_cast<const T*>(x.b);
  const int64_t a_step = x.a_depth_lines ? 1 : x.a_stride;
  const int64_t block = block_rows_of(x.k), blocks = ceil_div(x.k, block);
  const int64_t width = ceil_div(x.n, 16) * 16;
  const Scratch partials(static_cast<size_t>(blocks * width) * sizeof(float));
  const int64_t grain = ceil_div(kGrainElements, block * x.n);
  parallel_ranges(blocks, grain, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      float* sums = partials.as<float>() + i * width;
      const int64_t stop = smaller((i + 1) * block, x.k);
      for (int64_t k = i * block; k < stop; k += kRowsAtOnce) {
        const int64_t rows = smaller(kRowsAtOnce, stop - k);
        float factors[kRowsAtOnce];
        for (int64_t r = 0; r < rows; ++r) factors[r] = scalar_of(a[(k + r) * a_step]);
        const bool first = k == i * block;
        if (rows == kRowsAtOnce) {
          add_rows<T, kRowsAtOnce>(b + k * x.b_stride, x.b_stride, factors, sums, x.n, first);
          continue;
        }
        for (int64_t r = 0; r < rows; ++r) {
          add_rows<T, 1>(b + (k + r) * x.b_stride, x.b_stride, factors + r, sums, x.n, first && r == 0);
        }
      }
    }
  });
  parallel_ranges(x.n, kGrainElements / 4, [&](int64_t begin, int64_t end) {
    for_lanes(end - begin, [&](int64_t offset, int64_t lanes) {
      const int64_t n = begin + offset;
      Vec sum = {};
      for (int64_t i = 0; i < blocks; ++i) sum += load_some(partials.as<float>() + i * width + n, lanes);
      if (x.bias) sum += load_some(x.bias + n, lanes);
      if (!x.f32_out) {
        store_some(static_cast<bf16*>(x.out) + n, sum, lanes);
        return;
      }
      float* out = static_cast<float*>(x.out) + n;
      store_some(out, x.accumulate ? sum + load_some(out, lanes) : sum, lanes);
    });
  });
}

}  // namespace
}  // namespace GPTCORE_ISA_NS
}  // namespace gptcore
