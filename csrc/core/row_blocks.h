// What norms and sums over rows share: sums along a row, weights as f32, results past the caches, and sums over
// rows in blocks.
#pragma once

#include "core/parallel.h"
#include "core/simd.h"
#include "core/stream.h"

namespace gptcore {
namespace GPTCORE_ISA_NS {
namespace {

// Below this many elements a parallel loop costs more than it saves.
constexpr int64_t kGrainElements = 16384;

// Rows per block of a sum over rows. Fixed by the shape alone, so the bits do not know the thread count; at
// most 64 blocks, so that partial sums stay a small part of the traffic.
inline int64_t block_rows_of(int64_t rows) {
  const int64_t by_count = (rows + 63) / 64;
  return by_count < 16 ? 16 : by_count;
}

// take(offset, lanes, sum) over a row, where sum 0 and 1 alternate: two running sums.
template <class F>
GPTCORE_INLINE void for_two_sums(int64_t width, const F& take) {
  int64_t c = 0;
  for (; c + 2 * kLanes <= width; c += 2 * kLanes) {
    take(c, int64_t{kLanes}, 0), take(c + kLanes, int64_t{kLanes}, 1);
  }
  if (c + kLanes <= width) take(c, int64_t{kLanes}, 0), c += kLanes;
  if (c < width) take(c, width - c, 1);
}

// Weights or biases as f32, plus an offset: written once into `room` where they are bf16 or there is an offset, so
// that bodies are compiled for one kind of them; null stays null.
inline const float* as_f32(const void* weight, bool is_bf16, int64_t width, float* room,
                           float offset = 0.0f) {
  if (!weight || (!is_bf16 && offset == 0.0f)) return static_cast<const float*>(weight);
  for_lanes(width, [&](int64_t c, int64_t n) {
    const Vec value = is_bf16 ? load_some(static_cast<const bf16*>(weight) + c, n)
                              : load_some(static_cast<const float*>(weight) + c, n);
    store_some(room + c, offset == 0.0f ? value : value + offset, n);  // adding 0 would lose the sign of -0
  });
  return room;
}

// out[c] = value(c, lanes), streamed where `streams`, while `next`, the row to be read afterwards, is fetched.
template <class T, class F>
GPTCORE_INLINE void write_row(T* out, const T* next, int64_t width, bool streams, const F& value) {
  constexpr int64_t kPair = 2 * kLanes, kLineElements = 64 / static_cast<int64_t>(sizeof(T));
  int64_t c = 0;
  for (; c + kPair <= width; c += kPair) {
    __builtin_prefetch(next + c);
    if constexpr (kPair > kLineElements) __builtin_prefetch(next + c + kLineElements);
    const Vec low = value(c, int64_t{kLanes}), high = value(c + kLanes, int64_t{kLanes});
    if (streams) {
      stream(out + c, low, high);
    } else {
      store(out + c, low), store(out + c + kLanes, high);
    }
  }
  for_lanes(width - c, [&](int64_t at, int64_t n) { store_some(out + c + at, value(c + at, n), n); });
}

// Adds the blocks' partial sums, `stride` apart, in block order and stores them as f32 or bf16 where wanted.
inline void join_blocks(const float* partials, int64_t stride, int64_t blocks, int64_t width, void* out,
                        bool bf16_out) {
  if (!out) return;
  parallel_ranges(width, 4096, [&](int64_t begin, int64_t end) {
    for_lanes(end - begin, [&](int64_t offset, int64_t n) {
      const int64_t c = begin + offset;
      Vec sum = {};
      for (int64_t block = 0; block < blocks; ++block) sum += load_some(partials + block * stride + c, n);
      bf16_out ? store_some(static_cast<bf16*>(out) + c, sum, n)
               : store_some(static_cast<float*>(out) + c, sum, n);
    });
  });
}

}  // namespace
}  // namespace GPTCORE_ISA_NS
}  // namespace gptcore
