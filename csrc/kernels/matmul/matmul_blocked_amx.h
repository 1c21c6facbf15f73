// The bf16 product on AMX for more rows than decoding has; docs/kernels/matmul.md has the measurements behind
// its shape. A task is a block of the result and is wholly one thread's: it packs what it needs of A and B
// into its own scratch, so nothing is shared and no thread waits for another's packing. The levels, from the
// outside:
//
//   pass    a stretch of depth whose rows of A, packed, take 768 KB of L2; sums wait in f32 between passes
//   slab    128 columns of B, packed: whole stretches of B's lines are read, a page's worth where B lies
//   across strip   64 columns x all rows: B's 8 steps at a time (32 KB with A's) stay in L1 block   32 x 32
//   sums in four tiles over 8 steps, then back to memory (L1)
//
// An element's sum is one chain over k whatever the cut.
#pragma once

#include "core/arena.h"
#include "core/gemm_pack_amx.h"
#include "core/parallel.h"
#include "kernels/matmul/matmul_body.h"

namespace gptcore {
namespace GPTCORE_ISA_NS {
namespace {

constexpr int64_t kWholeSteps = 32;              // depth up to 1024 is one pass
constexpr int64_t kPassSteps = 24;               // else passes of at most 768
constexpr int64_t kPackedRowsBytes = 768 << 10;  // of A: 512 rows by 24 steps
constexpr int64_t kWaitingColumns = 768;         // of sums between passes: with 512 rows 1.5 MB
constexpr int64_t kSlabPairs = 4;
constexpr int64_t kStripPairs = 2;
constexpr int64_t kBlockSteps = 8;

constexpr int64_t kTileFloats = 256;
constexpr int64_t kBlockFloats = 4 * kTileFloats;  // tiles 00 01 10 11, each contiguous

// 32 x 32 sums c = or += a pair of A x a pair of B.
GPTCORE_INLINE void multiply_pairs(const char* a, const char* b, int64_t steps, float* c, bool add) {
  if (add) {
    _tile_loadd(0, c, kLine);
    _tile_loadd(1, c + kTileFloats, kLine);
    _tile_loadd(2, c + 2 * kTileFloats, kLine);
    _tile_loadd(3, c + 3 * kTileFloats, kLine);
  } else {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
  }
  for (int64_t s = 0; s < steps; ++s, a += kPairBytes, b += kPairBytes) {
    _tile_loadd(6, b, kLine);
    _tile_loadd(4, a, kLine);
    _tile_dpbf16ps(0, 4, 6);
    _tile_loadd(5, a + kStepBytes, kLine);
    _tile_dpbf16ps(2, 5, 6);
    _tile_loadd(7, b + kStepBytes, kLine);
    _tile_dpbf16ps(1, 4, 7);
    _tile_dpbf16ps(3, 5, 7);
  }
  _tile_stored(0, c, kLine);
  _tile_stored(2, c + 2 * kTileFloats, kLine);
  _tile_stored(1, c + kTileFloats, kLine);
  _tile_stored(3, c + 3 * kTileFloats, kLine);
}

// A block of the result, clipped to what exists.
struct Place {
  int64_t row, rows, column, columns;

  Place part(int64_t down, int64_t across, int64_t height, int64_t width) const {
    return {row + down, smaller(height, rows - down), column + across, smaller(width, columns - across)};
  }
};

GPTCORE_INLINE const float* sums_of_row(const float* c, int64_t r) {
  return c + r / kGroup * (2 * kTileFloats) + r % kGroup * kGroup;
}

// Sums of at most 32 x 32 to the result.
inline void put_block(const MatmulArgs& x, const Place& at, const float* c) {
  const int64_t left = smaller(at.columns, kGroup), right = at.columns - left;
  for (int64_t r = 0; r < at.rows; ++r) {
    const float* line = sums_of_row(c, r);
    Vec low = load(line), high = load(line + kTileFloats);
    if (x.bias) {
      low += load_n(x.bias + at.column, left);
      if (right > 0) high += load_n(x.bias + at.column + kGroup, right);
    }
    const int64_t offset = (at.row + r) * x.out_stride + at.column;
    if (x.f32_out) {
      float* out = static_cast<float*>(x.out) + offset;
      store_n(out, low, left);
      if (right > 0) store_n(out + kGroup, high, right);
      continue;
    }
    bf16* out = static_cast<bf16*>(x.out) + offset;
    if (right == kGroup) {  // one whole cache line, where rows are aligned
      *reinterpret_cast<Line32Unaligned*>(out) = (Line32)_mm512_cvtne2ps_pbh((__m512)high, (__m512)low);
    } else {
      store_n(out, low, left);
      if (right > 0) store_n(out + kGroup, high, right);
    }
  }
}

// What the result holds, to accumulate on.
inline void take_block(const MatmulArgs& x, const Place& at, float* c) {
  const int64_t left = smaller(at.columns, kGroup), right = at.columns - left;
  for (int64_t r = 0; r < at.rows; ++r) {
    float* line = const_cast<float*>(sums_of_row(c, r));
    const float* out = static_cast<const float*>(x.out) + (at.row + r) * x.out_stride + at.column;
    store(line, load_n(out, left));
    if (right > 0) store(line + kTileFloats, load_n(out + kGroup, right));
  }
}

struct BlockedProduct {
  const MatmulArgs& x;
  const Operand a, b;
  const int64_t steps, pass_steps;

  explicit BlockedProduct(const MatmulArgs& args)
      : x(args),
        a{static_cast<const char*>(args.a), args.a_stride * 2, args.a_depth_lines},
        b{static_cast<const char*>(args.b), args.b_stride * 2, args.b_depth_lines},
        steps(ceil_div(args.k, kPair)),
        pass_steps(steps <= kWholeSteps ? steps : even_pass(steps)) {}

  // Passes of about equal length, whole blocks of steps.
  static int64_t even_pass(int64_t steps) {
    return ceil_div(ceil_div(steps, ceil_div(steps, kPassSteps)), kBlockSteps) * kBlockSteps;
  }

  bool one_pass() const { return pass_steps >= steps; }
  int64_t most_rows() const { return kPackedRowsBytes / (pass_steps * kPairBytes) * kPair; }
  int64_t pair_bytes() const { return pass_steps * kPairBytes; }

  // Steps [first, first + count) of a pair of rows and a strip; `at` is their place.
  void multiply_strip(const char* rows, const char* strip, int64_t first, int64_t count, const Place& at,
                      float* c) const {
    const int64_t pairs = ceil_div(at.columns, kPair);
    if (x.accumulate && first == 0) {
      for (int64_t p = 0; p < pairs; ++p) {
        take_block(x, at.part(0, p * kPair, kPair, kPair), c + p * kBlockFloats);
      }
    }
    tile_fence();
    for (int64_t s = 0; s < count; s += kBlockSteps) {
      for (int64_t p = 0; p < pairs; ++p) {
        multiply_pairs(rows + s * kPairBytes, strip + p * pair_bytes() + s * kPairBytes,
                       smaller(kBlockSteps, count - s), c + p * kBlockFloats, x.accumulate || first + s > 0);
      }
    }
    if (first + count < steps) return;
    tile_fence();
    for (int64_t p = 0; p < pairs; ++p) {
      put_block(x, at.part(0, p * kPair, kPair, kPair), c + p * kBlockFloats);
    }
  }

  // Steps [first, first + count) of a task. Sums lie strip by strip, or, where one pass does all, in the room
  // of one strip, which stays in L1.
  void pass(const Place& task, int64_t first, int64_t count, char* rows, char* slab, float* sums) const {
    const int64_t depth = first * kPair, depths = smaller(count * kPair, x.k - depth);
    const int64_t groups = ceil_div(task.rows, kPair);
    pack_operand<Role::a>(a, task.row, task.rows, depth, depths, rows, pair_bytes());
    for (int64_t j = 0; j < task.columns; j += kSlabPairs * kPair) {
      const Place wide = task.part(0, j, task.rows, kSlabPairs * kPair);
      pack_operand<Role::b>(b, wide.column, wide.columns, depth, depths, slab, pair_bytes());
      for (int64_t i = 0; i < wide.columns; i += kStripPairs * kPair) {
        float* c = sums + (one_pass() ? 0 : (j + i) / kPair * groups * kBlockFloats);
        for (int64_t g = 0; g < groups; ++g) {
          multiply_strip(rows + g * pair_bytes(), slab + i / kPair * pair_bytes(), first, count,
                         wide.part(g * kPair, i, kPair, kStripPairs * kPair), c);
          if (!one_pass()) c += kStripPairs * kBlockFloats;
        }
      }
    }
  }

  void run(const Place& task) const {
    const int64_t groups = ceil_div(task.rows, kPair);
    const int64_t strips = one_pass() ? 1 : ceil_div(task.columns, kStripPairs * kPair) * groups;
    const Scratch rows(static_cast<size_t>(groups * pair_bytes()));
    const Scratch slab(static_cast<size_t>(kSlabPairs * pair_bytes()));
    const Scratch sums(static_cast<size_t>(strips * kStripPairs * kBlockFloats) * sizeof(float));
    const TileScope scope;
    for (int64_t first = 0; first < steps; first += pass_steps) {
      pass(task, first, smaller(pass_steps, steps - first), rows.as<char>(), slab.as<char>(),
           sums.as<float>());
    }
  }
};

// The size of a task: the cut that keeps all threads equally busy for the shortest time by the measured rates
// of multiplying and of packing, per unit of depth.
Place choose_task(const BlockedProduct& product) {
  constexpr double kMultiply = 2.0 / 1.8e12,
                   kPack = 2.0 / 18e9;  // seconds per element of the result, per line
  const MatmulArgs& x = product.x;
  const int64_t threads = num_threads(), least_tasks_down = ceil_div(x.m, product.most_rows());
  const int64_t strip = kStripPairs * kPair;
  const int64_t widest = product.one_pass() ? x.n : kWaitingColumns;
  Place best{};
  double least = 0;
  for (int64_t across = ceil_div(x.n, widest); across <= ceil_div(x.n, widest) + threads; ++across) {
    const int64_t columns = ceil_div(ceil_div(x.n, across), strip) * strip;
    for (int64_t down = least_tasks_down; down <= least_tasks_down + threads; ++down) {
      const int64_t rows = ceil_div(ceil_div(x.m, down), kPair) * kPair;
      const int64_t turns = ceil_div(ceil_div(x.m, rows) * ceil_div(x.n, columns), threads);
      const double cost = static_cast<double>(turns) * (kMultiply * static_cast<double>(rows * columns) +
                                                        kPack * static_cast<double>(rows + columns));
      if (best.rows == 0 || cost < least) {
        least = cost;
        best = {0, rows, 0, columns};
      }
    }
  }
  return best;
}

// A sum of no products is zero, plus the bias.
void put_empty_product(const MatmulArgs& x) {
  const float zeros[kBlockFloats] = {};
  const Place all{0, x.m, 0, x.n};
  for (int64_t m = 0; m < x.m; m += kPair) {
    for (int64_t n = 0; n < x.n; n += kPair) put_block(x, all.part(m, n, kPair, kPair), zeros);
  }
}

void blocked_product(const MatmulArgs& x) {
  if (x.k == 0) {
    if (!x.accumulate) put_empty_product(x);
    return;
  }
  const BlockedProduct product(x);
  const Place size = choose_task(product), all{0, x.m, 0, x.n};
  const int64_t across = ceil_div(x.n, size.columns);
  parallel_for(ceil_div(x.m, size.rows) * across, [&](int64_t t, int) {
    product.run(all.part(t / across * size.rows, t % across * size.columns, size.rows, size.columns));
  });
}

}  // namespace
}  // namespace GPTCORE_ISA_NS
}  // namespace gptcore
