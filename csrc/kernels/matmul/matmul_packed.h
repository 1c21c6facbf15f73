// The product through packed operands, for every shape and layout; included by matmul_cpu.cpp and
// matmul_amx.cpp.
#pragma once

#include "core/arena.h"
#include "core/gemm_tile.h"
#include "core/parallel.h"
#include "kernels/matmul/matmul_body.h"

namespace gptcore {
namespace GPTCORE_ISA_NS {
namespace {

// Columns of B packed at a time, and steps of depth (1024 of bf16, 512 of f32): 8 MB, shared in L3.
constexpr int64_t kColumnBlock = 4096;
constexpr int64_t kDepthSteps = 32;
// Rows of A that a task packs: at most 256 with the depth above is 512 KB, half of the smallest L2 we aim at.
constexpr int64_t kMostRows = 256, kLeastRows = 32;
// Columns whose f32 results wait beside them in L2 where they cannot go to `out` directly.
constexpr int64_t kColumnChunk = 192;

// About 16 tasks where the rows allow, so that threads finish together. No bit depends on it.
inline int64_t rows_per_task(int64_t m) {
  const int64_t rows = ceil_div(ceil_div(m, 16), kLeastRows) * kLeastRows;
  return rows < kMostRows ? rows : kMostRows;
}

template <class T>
GPTCORE_INLINE void store_block(const float* c, int64_t ldc, T* out, int64_t out_stride, int64_t rows,
                                int64_t columns, bool accumulate) {
  for (int64_t r = 0; r < rows; ++r) {
    for_lanes(columns, [&](int64_t j, int64_t n) {
      Vec value = load_some(c + r * ldc + j, n);
      if (accumulate) value += load_some(out + r * out_stride + j, n);
      store_some(out + r * out_stride + j, value, n);
    });
  }
}

template <class Policy>
struct PackedProduct {
  const MatmulArgs& x;
  const Lines a, b;
  const int64_t depth_steps;
  const char* columns;  // packed B of the current block

  explicit PackedProduct(const MatmulArgs& args)
      : x(args),
        a{args.a,
          args.dtype,
          args.a_stride,
          nullptr,
          args.a_depth_lines ? args.m : args.k,
          args.a_depth_lines ? args.k : args.m},
        b{args.b,
          args.dtype,
          args.b_stride,
          nullptr,
          args.b_depth_lines ? args.n : args.k,
          args.b_depth_lines ? args.k : args.n},
        depth_steps(args.f32_out ? kDepthSteps : ceil_div(args.k, kStepDepth<typename Policy::P>)),
        columns(nullptr) {}

  // out[row .. row + rows, first_column ...] from depth steps [step, step + steps).
  void task(int64_t row, int64_t rows, int64_t first_column, int64_t count, int64_t step,
            int64_t steps) const {
    using P = typename Policy::P;
    const int64_t groups = ceil_div(rows, kGroup), stride = steps * kStepBytes;
    const Scratch packed(static_cast<size_t>(groups * stride));
    for (int64_t g = 0; g < groups; ++g) {
      pack_a<P>(a, x.a_depth_lines, row + g * kGroup, step * kStepDepth<P>, steps,
                packed.as<char>() + g * stride);
    }
    const bool from_bias = x.bias && step == 0;
    const bool add = x.accumulate || step > 0 || from_bias;
    const bool direct = x.f32_out && rows % kGroup == 0;
    const int64_t ldc = kColumnChunk + kGroup;
    const Scratch results(static_cast<size_t>(groups * kGroup * ldc) * sizeof(float));
    [[maybe_unused]] const typename Policy::Scope scope;
    for (int64_t j = 0; j < count; j += kColumnChunk) {
      const int64_t width = smaller(kColumnChunk, count - j), panels = ceil_div(width, kGroup);
      const char* panel = columns + j / kGroup * stride;
      const int64_t offset = row * x.out_stride + first_column + j;
      if (direct && width % kGroup == 0) {
        float* out = static_cast<float*>(x.out) + offset;
        if (from_bias) repeat_row(x.bias + first_column + j, out, x.out_stride, rows, width);
        multiply_block<Policy>(packed.as<char>(), stride, groups, panel, stride, panels, steps, out,
                               x.out_stride, add);
        continue;
      }
      float* c = results.as<float>();
      if (from_bias) {
        repeat_row(x.bias + first_column + j, c, ldc, rows, width);
      } else if (add) {
        fetch(static_cast<const float*>(x.out) + offset, c, ldc, rows, width);
      }
      multiply_block<Policy>(packed.as<char>(), stride, groups, panel, stride, panels, steps, c, ldc, add);
      if (x.f32_out) {
        store_block(c, ldc, static_cast<float*>(x.out) + offset, x.out_stride, rows, width, false);
      } else {
        store_block(c, ldc, static_cast<bf16*>(x.out) + offset, x.out_stride, rows, width, false);
      }
    }
  }

  // Sums start from the bias, in the result or beside it.
  static void repeat_row(const float* row, float* c, int64_t ldc, int64_t rows, int64_t width) {
    store_block(row, 0, c, ldc, rows, width, false);
  }

  // Sums go on from what `out` holds, as in the direct case, so both give the same bits.
  void fetch(const float* out, float* c, int64_t ldc, int64_t rows, int64_t width) const {
    store_block(out, x.out_stride, c, ldc, rows, width, false);
  }

  void run() {
    using P = typename Policy::P;
    const int64_t all_steps = ceil_div(x.k, kStepDepth<P>);
    const int64_t block_rows = rows_per_task(x.m), row_tasks = ceil_div(x.m, block_rows);
    const Scratch packed(
        static_cast<size_t>(packed_bytes(smaller(x.n, kColumnBlock), smaller(depth_steps, all_steps))));
    columns = packed.as<char>();
    for (int64_t column = 0; column < x.n; column += kColumnBlock) {
      const int64_t count = smaller(kColumnBlock, x.n - column);
      for (int64_t step = 0; step == 0 || step < all_steps; step += depth_steps) {
        const int64_t steps = smaller(depth_steps, all_steps - step);
        parallel_for(ceil_div(count, kGroup), [&](int64_t p, int) {
          pack_b<P>(b, x.b_depth_lines, column + p * kGroup, step * kStepDepth<P>, steps,
                    packed.as<char>() + p * steps * kStepBytes);
        });
        parallel_for(row_tasks, [&](int64_t t, int) {
          const int64_t row = t * block_rows;
          task(row, smaller(block_rows, x.m - row), column, count, step, steps);
        });
        if (steps == 0) break;
      }
    }
  }
};

template <class Policy>
void packed_product(const MatmulArgs& args) {
  PackedProduct<Policy>(args).run();
}

}  // namespace
}  // namespace GPTCORE_ISA_NS
}  // namespace gptcore
