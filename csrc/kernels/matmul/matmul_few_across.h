// Few rows times a matrix whose rows run across, as a Conv1D stores its weight: out[m,n] = sum_k a[m,k] b[k,n].
// b is read once, in strips of columns: a thread holds a strip's sums and goes down its rows, a chunk at a time, while
// the next chunk is fetched. An element is one chain over k in every blocking; included by matmul_cpu.cpp.
#pragma once

#include "core/parallel.h"
#include "kernels/matmul/matmul_one_row.h"

namespace gptcore {
namespace GPTCORE_ISA_NS {
namespace {

// A strip's 64 rows of sums are 32 KB of L2, its chunk of b at most 8 KB of L1.
constexpr int64_t kStripColumns = 128;
constexpr int64_t kChunkRows = 16;
#if defined(__AVX512F__)
constexpr int kAcrossRows = 8;
#else
constexpr int kAcrossRows = 4;
#endif

// A chunk of a as f32, depth by depth, so that the rows' factors of one row of b lie together.
struct Factors {
  float at[kChunkRows][kFewRows];
};

template <class T>
GPTCORE_INLINE void take_factors(const MatmulArgs& x, int64_t k, int64_t depth, Factors& factors) {
  const T* a = static_cast<const T*>(x.a) + k;
  for (int64_t m = 0; m < x.m; ++m) {
    for (int64_t i = 0; i < depth; ++i) factors.at[i][m] = scalar_of(a[m * x.a_stride + i]);
  }
}

// A chunk of b: `rows` of it. ahead: elements to what is fetched with each row, into L2, since rows some KB apart share
// few places of L1.
template <class T>
struct Chunk {
  const T* b;
  int64_t stride, rows, ahead;
};

// kM rows' sums of kN vectors of columns (of one vector: `lanes` of it) go on by a chunk.
template <class T, int kM, int kN>
GPTCORE_INLINE void add_chunk(const float* factors, const Chunk<T>& chunk, float* sums, int64_t lanes) {
  const T* b = chunk.b;
  Vec sum[kM][kN];
#pragma GCC unroll 16
  for (int i = 0; i < kM * kN; ++i)
    sum[i / kN][i % kN] = load(sums + i / kN * kStripColumns + i % kN * kLanes);
  for (int64_t k = 0; k < chunk.rows; ++k, b += chunk.stride, factors += kFewRows) {
    Vec line[kN];
#pragma GCC unroll 2
    for (int j = 0; j < kN; ++j) {
      line[j] = kN == 1 ? load_some(b, lanes) : load(b + j * kLanes);
      __builtin_prefetch(b + chunk.ahead + j * kLanes, 0, 2);
    }
#pragma GCC unroll 8
    for (int i = 0; i < kM; ++i) {
#pragma GCC unroll 2
      for (int j = 0; j < kN; ++j) sum[i][j] += factors[i] * line[j];
    }
  }
#pragma GCC unroll 16
  for (int i = 0; i < kM * kN; ++i)
    store(sums + i / kN * kStripColumns + i % kN * kLanes, sum[i / kN][i % kN]);
}

// All rows' sums of kN vectors of columns; the first rows fetch.
template <class T, int kN>
GPTCORE_INLINE void add_rows_chunk(const MatmulArgs& x, const Factors& factors, Chunk<T> chunk, float* sums,
                                   int64_t lanes) {
  const float* at = factors.at[0];
  int64_t m = 0;
  const auto next = [&](int64_t rows) __attribute__((always_inline)) {
    m += rows;
    chunk.ahead = 0;
  };
  for (; m + kAcrossRows <= x.m; next(kAcrossRows)) {
    add_chunk<T, kAcrossRows, kN>(at + m, chunk, sums + m * kStripColumns, lanes);
  }
  for (; m + 2 <= x.m; next(2)) add_chunk<T, 2, kN>(at + m, chunk, sums + m * kStripColumns, lanes);
  if (m < x.m) add_chunk<T, 1, kN>(at + m, chunk, sums + m * kStripColumns, lanes);
}

GPTCORE_INLINE void put_strip(const MatmulArgs& x, int64_t first, int64_t columns, const float* sums) {
  for (int64_t m = 0; m < x.m; ++m) {
    for_lanes(columns, [&](int64_t j, int64_t lanes) {
      const int64_t n = first + j, at = m * x.out_stride + n;
      Vec sum = load(sums + m * kStripColumns + j);
      if (x.bias) sum += load_some(x.bias + n, lanes);
      if (!x.f32_out) {
        store_some(static_cast<bf16*>(x.out) + at, sum, lanes);
        return;
      }
      float* out = static_cast<float*>(x.out) + at;
      store_some(out, x.accumulate ? sum + load_some(out, lanes) : sum, lanes);
    });
  }
}

template <class T>
void strip_across(const MatmulArgs& x, int64_t first) {
  const int64_t columns = smaller(kStripColumns, x.n - first);
  const Scratch room(static_cast<size_t>(x.m * kStripColumns) * sizeof(float));
  float* sums = room.as<float>();
  __builtin_memset(sums, 0, static_cast<size_t>(x.m * kStripColumns) * sizeof(float));
  Factors factors;
  for (int64_t k = 0; k < x.k; k += kChunkRows) {
    const int64_t rows = smaller(kChunkRows, x.k - k);
    take_factors<T>(x, k, rows, factors);
    const T* b = static_cast<const T*>(x.b) + k * x.b_stride + first;
    const auto chunk = [&](int64_t n) { return Chunk<T>{b + n, x.b_stride, rows, kChunkRows * x.b_stride}; };
    int64_t n = 0;
    for (; n + 2 * kLanes <= columns; n += 2 * kLanes)
      add_rows_chunk<T, 2>(x, factors, chunk(n), sums + n, kLanes);
    for (; n < columns; n += kLanes) {
      add_rows_chunk<T, 1>(x, factors, chunk(n), sums + n, smaller(kLanes, columns - n));
    }
  }
  put_strip(x, first, columns, sums);
}

// body(task) for each: alone where threads would take longer to start.
template <class Body>
void run_tasks(const MatmulArgs& x, int64_t tasks, const Body& body) {
  if (x.m * x.n * x.k <= kSerialProducts) {
    for (int64_t task = 0; task < tasks; ++task) body(task);
  } else {
    parallel_for(tasks, [&](int64_t task, int) { body(task); });
  }
}

template <class T>
void few_rows_across(const MatmulArgs& x) {
  run_tasks(x, ceil_div(x.n, kStripColumns), [&](int64_t i) { strip_across<T>(x, i * kStripColumns); });
}

}  // namespace
}  // namespace GPTCORE_ISA_NS
}  // namespace gptcore
