// The patterns of the Sparse Transformer (Child et al. 2019, section 4.3), which thin out a row's interval of keys.
// The query at place i, counted so that it would be key i, sees key j <= i where
//
//   strided  i - j <= stride, or stride divides i - j
//   fixed    i and j lie in the same block of `stride` keys, or j is one of the last `summary` keys of its block
//
// Both are one rule: j >= local(i), or j mod stride in [low(i), high(i)). Blocks of keys that no row of a block of rows
// sees are found by arithmetic and not touched; within the others the rule hides key by key.
#pragma once

#include "core/arena.h"
#include "core/simd.h"
#include "kernels/attention/mask_range.h"

namespace gptcore {
namespace GPTCORE_ISA_NS {
namespace {

// Keys are visited or not in steps of so many.
constexpr int kPatternStep = 32;

GPTCORE_INLINE bool any_lane(VecI mask) {
#if defined(__AVX512F__)
  return _mm512_movepi32_mask((__m512i)mask) != 0;
#elif defined(__AVX2__)
  return _mm256_movemask_ps((__m256)mask) != 0;
#elif defined(__SSE2__)
  return _mm_movemask_ps((__m128)mask) != 0;
#else
  int32_t any = 0;
  for (int i = 0; i < kLanes; ++i) any |= mask[i];
  return any != 0;
#endif
}

class Pattern {
 public:
  Pattern(const AttentionProblem& p, const Sequence& s)
      : s_(s),
        stride_(p.stride),
        summary_(p.summary),
        scratch_(static_cast<size_t>(active() ? round_up(s.keys, kPatternStep) : 0) * sizeof(int32_t)) {
    if (!active()) return;
    int32_t value = 0;
    for (int64_t key = 0; key < round_up(s.keys, kPatternStep); ++key) {
      remainders()[key] = value;
      if (++value == stride_) value = 0;
    }
  }

  bool active() const { return stride_ != 0; }
  int32_t remainder_of(int64_t key) const { return remainders()[key]; }
  // Rows that stand before the first key see nothing; any place will do for them.
  int64_t place_of(int64_t row) const { return at_least(s_.place_of(row), 0); }
  int32_t local(int64_t place) const {
    return static_cast<int32_t>(summary_ ? place / stride_ * stride_ : place - stride_);
  }
  int32_t low(int64_t place) const {
    return static_cast<int32_t>(summary_ ? stride_ - summary_ : place % stride_);
  }
  int32_t high(int64_t place) const { return summary_ ? static_cast<int32_t>(stride_) : low(place) + 1; }

  // Whether a row of [first_row, end_row) sees a key of [begin, end); may say yes where none does.
  bool any(int64_t first_row, int64_t end_row, int64_t begin, int64_t end) const {
    const int64_t first = place_of(first_row), last = place_of(at_most(end_row, s_.rows()) - 1);
    if (begin > last) return false;
    end = at_most(end, last + 1);
    if (summary_ == 0) {
      const int64_t nearest = at_least(first - end + 1, 0);
      return nearest <= stride_ || (last - begin) / stride_ * stride_ >= nearest;
    }
    const int64_t to_summary = at_least(stride_ - summary_ - begin % stride_, 0);
    return (end - 1) / stride_ >= first / stride_ || begin + to_summary < end;
  }

  // Scales the scores of row `row` with keys [key, key + count), and gives -inf to those that it does not see; count
  // is a multiple of kLanes. From the first visible to the last, in whole vectors.
  __attribute__((noinline)) Range hide(int64_t row, int64_t key, int64_t count, float scale,
                                       float* scores) const {
    const Range seen = s_.keys_of(row);
    const int64_t place = place_of(row);
    const VecI begin = splat_int(static_cast<int32_t>(seen.begin)),
               end = splat_int(static_cast<int32_t>(seen.end));
    const VecI near = splat_int(local(place)), from = splat_int(low(place)), to = splat_int(high(place));
    Range hull{count, 0};
    for (int64_t c = 0; c < count; c += kLanes) {
      const VecI at = splat_int(static_cast<int32_t>(key + c)) + lane_index();
      VecI inside = VecI{};
      if (key + c < seen.end) {
        const VecI remainder = (VecI)load(reinterpret_cast<const float*>(remainders() + key + c));
        inside = (at >= begin) & (at < end) & ((at >= near) | ((remainder >= from) & (remainder < to)));
      }
      store(scores + c, inside ? load(scores + c) * scale : splat(-__builtin_inff()));
      if (any_lane(inside)) hull = {at_most(hull.begin, c), c + kLanes};
    }
    return hull;
  }

 private:
  int32_t* remainders() const { return scratch_.as<int32_t>(); }

  const Sequence& s_;
  const int64_t stride_, summary_;
  const Scratch scratch_;
};

}  // namespace
}  // namespace GPTCORE_ISA_NS
}  // namespace gptcore
