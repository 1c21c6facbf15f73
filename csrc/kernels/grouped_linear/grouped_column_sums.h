// Sums over the rows of a group, column by column: a bias's gradient.
#pragma once

#include "core/arena.h"
#include "core/gemm_tile.h"
#include "core/stream.h"
#include "kernels/grouped_linear/grouped_linear_body.h"

namespace gptcore {
namespace GPTCORE_ISA_NS {
namespace {

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

inline bool past_caches(const void* out, int64_t bytes) { return can_stream(out, 64, bytes); }

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
