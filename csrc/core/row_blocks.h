// What norms and sums over rows share: sums along a row, weights as f32, results past the caches, and sums over
// rows in blocks.
#pragma once

#include "core/parallel.h"
#include "core/prefetch.h"
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

inline size_t row_bytes(int64_t width) { return static_cast<size_t>(width) * sizeof(float); }

// A norm's weights as as_f32() gives them, or ones where there are none. Bodies without a question whether there is
// a weight are faster by more than the product costs.
inline bool needs_copy(const void* weight, bool is_bf16, float offset) {
  return !weight || is_bf16 || offset != 0;
}
inline const float* factors(const void* weight, bool is_bf16, int64_t width, float* room, float offset) {
  if (weight) return as_f32(weight, is_bf16, width, room, offset);
  for_lanes(width, [&](int64_t c, int64_t n) { store_some(room + c, splat(1.0f), n); });
  return room;
}

typedef uint32_t VecUUnaligned __attribute__((vector_size(kLanes * 4), aligned(2), may_alias));

// Two vectors side by side, which in bf16 are one: rows go by pairs, and one vector or a part of one is left.
constexpr int64_t kPairLanes = 2 * kLanes;
struct Pair {
  Vec low, high;
};

template <class T>
GPTCORE_INLINE Pair load_pair(const T* p) {
  return {load(p), load(p + kLanes)};
}

// The same elements where their order does not matter: bf16 as even and odd ones, an instruction for each vector
// in place of two.
GPTCORE_INLINE Pair load_any_order(const float* p) { return load_pair(p); }
GPTCORE_INLINE Pair load_any_order(const bf16* p) {
  const VecU words = *reinterpret_cast<const VecUUnaligned*>(p);
  return {(Vec)(words << 16), (Vec)(words & 0xffff0000u)};
}

GPTCORE_INLINE void store_pair(float* p, Pair x) { store(p, x.low), store(p + kLanes, x.high); }
GPTCORE_INLINE void store_pair(bf16* p, Pair x) {
#if defined(__AVX512BF16__)
  *reinterpret_cast<VecUUnaligned*>(p) = (VecU)_mm512_cvtne2ps_pbh((__m512)x.high, (__m512)x.low);
#else
  store(p, x.low), store(p + kLanes, x.high);
#endif
}

// Past the caches where `streams`; see can_stream().
template <class T>
GPTCORE_INLINE void write_pair(T* p, Pair x, bool streams) {
  if (streams) {
    stream(p, x.low, x.high);
  } else {
    store_pair(p, x);
  }
}

GPTCORE_INLINE Pair plus(Pair a, Pair b) { return {a.low + b.low, a.high + b.high}; }

// Asks for the pair at p.
template <class T>
GPTCORE_INLINE void prefetch_pair(const T* p) {
  __builtin_prefetch(p);
  if constexpr (kPairLanes * sizeof(T) > 64) __builtin_prefetch(p + kLanes);
}

// Asks for the pair 8 KiB behind p, into L2, which has room for more lines under way than L1: a core's window holds too
// few pairs to cover the latency of memory, and stores past the caches take the same places in L1.
template <class T>
GPTCORE_INLINE void fetch_pair_ahead(const T* p) {
  fetch_ahead<8192, 2>(p);
  if constexpr (kPairLanes * sizeof(T) > 64) fetch_ahead<8192 + 64, 2>(p);
}

// pair(offset, s) over a row's pairs, where s counts 0, 1, 0, ...: one of two sets of running sums; then
// some(offset, lanes) over what is left.
template <class P, class S>
GPTCORE_INLINE void for_pairs(int64_t width, const P& pair, const S& some) {
  int64_t c = 0;
  for (; c + 2 * kPairLanes <= width; c += 2 * kPairLanes) pair(c, 0), pair(c + kPairLanes, 1);
  if (c + kPairLanes <= width) pair(c, 0), c += kPairLanes;
  for_lanes(width - c, [&](int64_t at, int64_t n) { some(c + at, n); });
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
