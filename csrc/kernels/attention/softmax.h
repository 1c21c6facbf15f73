// exp2 and the online softmax over rows of a score block.
#pragma once

#include <cstdint>

#include "core/log.h"
#include "core/simd.h"
#include "kernels/attention/mask_range.h"
#include "kernels/attention/pack.h"

namespace gptcore {
namespace GPTCORE_ISA_NS {
namespace {

constexpr float kLog2e = 1.44269504088896341f;
constexpr float kLn2 = 0.69314718055994531f;
constexpr float kInfinity = __builtin_inff();

// 2^x = 2^n * 2^f, a minimax polynomial (relative error, Remez) in f. Degree 5 serves f32; degree 3 is off by at most
// 1.0e-4, a twentieth of what rounding to bf16 costs afterwards. The constant term is 1, so that 2^0 = 1. NaN stays
// NaN, -inf gives 0; so does -127 without AVX-512, whose exponent field is that.
//
// AVX-512 takes f = x - floor(x) in one instruction (0 for infinities) and scales by 2^floor(x) in another, so that
// nothing need be rounded or limited; elsewhere n is the nearest integer.
template <bool kFine>
GPTCORE_INLINE Vec exp2_of(Vec x) {
#if defined(__AVX512F__)
  const Vec f = (Vec)_mm512_reduce_ps((__m512)x, _MM_FROUND_TO_NEG_INF);
  Vec p;
  if constexpr (kFine) {  // 8.3e-8
    p = f * 0.0018671300495043397f + 0.009017030708491802f;
    p = p * f + 0.05579991266131401f;
    p = p * f + 0.24016444385051727f;
    p = p * f + 0.6931512951850891f;
  } else {  // 8.6e-5
    p = f * 0.07706717f + 0.22764485f;
    p = p * f + 0.69511682f;
  }
  p = p * f + 1.0f;
  return (Vec)_mm512_scalef_ps((__m512)p, (__m512)x);
#else
  x = max(splat(-127.0f), min(splat(127.0f), x));
  const Vec magic = splat(12582912.0f);  // 1.5 * 2^23: adding it leaves the nearest integer in the low bits
  const Vec shifted = x + magic;
  const Vec f = x - (shifted - magic);
  Vec p;
  if constexpr (kFine) {  // 9.1e-8
    p = f * 0.001326472731307149f + 0.009671512991189957f;
    p = p * f + 0.05550733581185341f;
    p = p * f + 0.24022242426872253f;
    p = p * f + 0.6931470036506653f;
  } else {  // 1.0e-4
    p = f * 0.05500892922282219f + 0.2422109693288803f;
    p = p * f + 0.6932829022407532f;
  }
  p = p * f + 1.0f;
  return (Vec)((VecI)p + ((VecI)shifted << 23));
#endif
}

// Larger of two, or b where either is NaN, as one instruction.
GPTCORE_INLINE Vec larger(Vec a, Vec b) {
#if defined(__AVX512F__)
  return (Vec)_mm512_max_ps((__m512)a, (__m512)b);
#else
  return max(a, b);
#endif
}

GPTCORE_INLINE float largest(Vec x) {
#if defined(__AVX512F__)
  return _mm512_reduce_max_ps((__m512)x);
#else
  return reduce_max(x);
#endif
}

// Whether any lane exceeds the limit; NaN does not.
GPTCORE_INLINE bool any_above(Vec x, float limit) {
#if defined(__AVX512F__)
  return _mm512_cmp_ps_mask((__m512)x, (__m512)splat(limit), _CMP_GT_OQ) != 0;
#elif defined(__AVX2__)
  return _mm256_movemask_ps((__m256)(x > splat(limit))) != 0;
#elif defined(__SSE2__)
  return _mm_movemask_ps((__m128)(x > splat(limit))) != 0;
#else
  return reduce_max(x) > limit;
#endif
}

// x in lanes whose column lies in `visible`, else fill; lane 0 is column `column`.
GPTCORE_INLINE Vec keep_visible(Vec x, int64_t column, Range visible, float fill) {
  const VecI index = lane_index() + splat_int(static_cast<int32_t>(column));
  const VecI inside = (index >= splat_int(static_cast<int32_t>(visible.begin))) &
                      (index < splat_int(static_cast<int32_t>(visible.end)));
  return inside ? x : splat(fill);
}

// A range of columns as whole vectors [begin, end) and the partly visible ones before and after.
struct VectorRange {
  int64_t begin, end;
  bool head, tail;

  explicit VectorRange(Range r)
      : begin(round_up(r.begin, kLanes)),
        end(round_down(r.end, kLanes)),
        head(r.begin != begin),
        tail(r.end != end) {
    if (begin > end) begin = end, head = false;  // begins and ends within one vector: all of it is tail
  }
};

// State of the rows of a block: the shift that is subtracted from scaled scores, and the sum of exponentials
// so far, lane by lane.
template <int kRows>
struct RowStates {
  alignas(64) float raw_max[kRows];
  alignas(64) float shift[kRows];
  alignas(64) float sum[kRows][kLanes];

  // For `rows` rounded up to whole vectors, which finish() works on.
  void reset(int64_t rows) {
    static_assert(kRows % kLanes == 0);
    for (int64_t r = 0; r < round_up(rows, kLanes); ++r) {
      raw_max[r] = -kInfinity, shift[r] = 0;
      store(sum[r], Vec{});
    }
  }

  // Leaves 1 / sum in raw_max (0 where nothing was seen) and lse in shift.
  void finish(int64_t rows) {
    for (int64_t r = 0; r < rows; r += kLanes) {
      Vec part[kLanes];
#pragma GCC unroll 16
      for (int i = 0; i < kLanes; ++i) part[i] = load(sum[r + i]);
      transpose(part);
      for (int width = kLanes / 2; width > 0; width /= 2) {
        for (int i = 0; i < width; ++i) part[i] += part[i + width];
      }
      const VecI nothing = part[0] == Vec{};
      store(raw_max + r, nothing ? Vec{} : 1.0f / part[0]);
      store(shift + r, nothing ? splat(-kInfinity) : load(shift + r) * kLn2 + log(part[0]));
    }
  }
};

// How far, in powers of two, scores may exceed the shift before the sums so far are rescaled. Probabilities
// then reach 2^8, far from f32's limits, and most blocks after the first need no rescaling.
constexpr float kSlack = 8.0f;

// Lane by lane, NaN passed over.
GPTCORE_INLINE Vec visible_max(const float* s, Range visible, const VectorRange& v) {
  Vec a = splat(-kInfinity), b = a, c = a, d = a;
  int64_t i = v.begin;
  for (; i + 4 * kLanes <= v.end; i += 4 * kLanes) {
    a = larger(load(s + i), a);
    b = larger(load(s + i + kLanes), b);
    c = larger(load(s + i + 2 * kLanes), c);
    d = larger(load(s + i + 3 * kLanes), d);
  }
  for (; i < v.end; i += kLanes) a = larger(load(s + i), a);
  if (v.head) b = larger(keep_visible(load(s + v.begin - kLanes), v.begin - kLanes, visible, -kInfinity), b);
  if (v.tail) c = larger(keep_visible(load(s + v.end), v.end, visible, -kInfinity), c);
  return larger(larger(a, b), larger(c, d));
}

// Turns the scores of one row into probabilities, in place (bf16 ones fill the first half of their row), and
// brings sum and output so far to the same shift. Columns of `width` that are not visible become 0.
template <class Engine, int kRows>
GPTCORE_INLINE void softmax_row(RowStates<kRows>& state, int64_t r, float* s, Range visible, Range width,
                                float scale, float* out, int64_t out_size) {
  using Score = typename Engine::Score;
  Score* p = reinterpret_cast<Score*>(s);
  if (visible.empty()) {
    for (int64_t i = width.begin; i < width.end; i += kLanes) store(p + i, Vec{});
    return;
  }
  const VectorRange v(visible);
  const Vec tops = visible_max(s, visible, v);
  // Lane by lane: the maximum across lanes would cost as much as four vectors of exponentials, and is seldom needed.
  if (state.raw_max[r] == -kInfinity || any_above((tops - state.raw_max[r]) * scale, kSlack)) {
    const float top = largest(tops);
    const float shift = top == -kInfinity ? 0 : top * scale;
    if (state.raw_max[r] != -kInfinity) {
      const Vec factor = exp2_of<true>(splat(state.shift[r] - shift));
      store(state.sum[r], load(state.sum[r]) * factor);
      for (int64_t d = 0; d < out_size; d += kLanes) store(out + d, load(out + d) * factor);
    }
    state.raw_max[r] = top, state.shift[r] = shift;
  }
  const Vec shift = splat(state.shift[r]);
  Vec sum = load(state.sum[r]), other = {};
  for (int64_t i = width.begin; i < v.begin - (v.head ? kLanes : 0); i += kLanes) store(p + i, Vec{});
  if (v.head) {
    const int64_t i = v.begin - kLanes;
    const Vec x = keep_visible(exp2_of<Engine::kFine>(load(s + i) * scale - shift), i, visible, 0);
    sum += x;
    store(p + i, x);
  }
  int64_t i = v.begin;
  for (; i + 2 * kLanes <= v.end; i += 2 * kLanes) {
    const Vec x = exp2_of<Engine::kFine>(load(s + i) * scale - shift);
    const Vec y = exp2_of<Engine::kFine>(load(s + i + kLanes) * scale - shift);
    sum += x, other += y;
    Engine::store_two(p + i, x, y);
  }
  if (i < v.end) {
    const Vec x = exp2_of<Engine::kFine>(load(s + i) * scale - shift);
    sum += x;
    store(p + i, x);
    i += kLanes;
  }
  if (v.tail) {
    const Vec x = keep_visible(exp2_of<Engine::kFine>(load(s + i) * scale - shift), i, visible, 0);
    other += x;
    store(p + i, x);
    i += kLanes;
  }
  for (; i < width.end; i += kLanes) store(p + i, Vec{});
  store(state.sum[r], sum + other);
}

}  // namespace
}  // namespace GPTCORE_ISA_NS
}  // namespace gptcore
