#include "core/log.h"
#include "core/parallel.h"
#include "core/simd.h"
#include "kernels/cross_entropy/cross_entropy_body.h"

namespace gptcore {
namespace GPTCORE_ISA_NS {
namespace {

// Four running vectors hide the latency of an addition at two per cycle.
constexpr int kSums = 4;
// Below this many logits a parallel loop costs more than it saves.
constexpr int64_t kGrainElements = 8192;
constexpr float kLog2e = 1.44269504088896341f;

// Joins term(offset, lanes) over a row by `join`, in kSums running vectors and a fixed tree.
template <class Term, class Join>
GPTCORE_INLINE Vec join_row(int64_t size, float start, const Term& term, const Join& join) {
  Vec sums[kSums] = {splat(start), splat(start), splat(start), splat(start)};
  int64_t i = 0;
  for (; i + kSums * kLanes <= size; i += kSums * kLanes) {
    for (int s = 0; s < kSums; ++s) sums[s] = join(sums[s], term(i + s * kLanes, int64_t{kLanes}));
  }
  for (; i + kLanes <= size; i += kLanes) sums[0] = join(sums[0], term(i, int64_t{kLanes}));
  if (i < size) sums[1] = join(sums[1], keep_n(term(i, size - i), size - i, start));
  return join(join(sums[0], sums[1]), join(sums[2], sums[3]));
}

// A row's largest logit and the sum of its exponentials relative to that. By 2^u, half the instructions of e^x: the
// rounding of u = d log2(e) costs a term e^-d at most d 2^-24 of itself, so 2^-25 of the sum.
template <class T>
GPTCORE_INLINE void sum_of_exponentials(const T* row, int64_t classes, float* top, float* sum) {
  const Vec tops = join_row(
      classes, -__builtin_inff(), [&](int64_t i, int64_t n) { return load_some(row + i, n); },
      [](Vec x, Vec y) { return max(x, y); });
  const float largest = reduce_max(tops);
  *top = largest;
  *sum = reduce_add(join_row(
      classes, 0.0f, [&](int64_t i, int64_t n) { return exp2((load_some(row + i, n) - largest) * kLog2e); },
      [](Vec x, Vec y) { return x + y; }));
}

template <class T>
GPTCORE_INLINE float weighted_sum(const CrossEntropyForward& a, const T* row) {
  return reduce_add(join_row(
      a.classes, 0.0f,
      [&](int64_t i, int64_t n) {
        const Vec logits = load_some(row + i, n);
        return a.class_weight ? logits * load_some(a.class_weight + i, n) : logits;
      },
      [](Vec x, Vec y) { return x + y; }));
}

// Rows go by kLanes, whose logarithms are one vector: for few classes one a row takes as long as its exponentials.
template <class T>
void forward(const CrossEntropyForward& a) {
  parallel_ranges(a.rows, kGrainElements / a.classes + 1, [&](int64_t begin, int64_t end) {
    for (int64_t first = begin; first < end; first += kLanes) {
      const int64_t count = first + kLanes < end ? int64_t{kLanes} : end - first;
      float tops[kLanes] = {}, sums[kLanes] = {};
      for (int64_t i = 0; i < count; ++i) {
        const int64_t r = first + i;
        const T* row = static_cast<const T*>(a.logits) + a.index[r] * a.stride;
        sum_of_exponentials(row, a.classes, tops + i, sums + i);
        a.target_logit[r] = load_n(row + a.targets[r], 1)[0];
        if (a.logit_sum) a.logit_sum[r] = weighted_sum(a, row);
      }
      store_n(a.lse + first, load(tops) + log(load(sums)), count);
    }
  });
}

template <class T>
void backward(const CrossEntropyBackward& a) {
  parallel_ranges(a.rows, kGrainElements / a.classes + 1, [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r) {
      const T* row = static_cast<const T*>(a.logits) + a.index[r] * a.stride;
      T* out = static_cast<T*>(a.dlogits) + a.index[r] * a.out_stride;
      const float lse = a.lse[r], factor = a.softmax_factor[r], uniform = a.uniform ? a.uniform[r] : 0.0f;
      const int32_t target = a.targets[r];
      const auto gradient = [&](int64_t i, int64_t n) {
        const Vec g = exp(load_some(row + i, n) - lse) * factor;
        if (!a.uniform) return g;
        return a.class_weight ? g - uniform * load_some(a.class_weight + i, n) : g - uniform;
      };
      // The target's vector is rounded once, with its share taken off; it is computed before `out`, which may
      // be the logits themselves, is written.
      const int64_t at = target / kLanes * kLanes;
      const int64_t lanes = at + kLanes <= a.classes ? int64_t{kLanes} : a.classes - at;
      const VecI hit = lane_index() == splat_int(target - static_cast<int32_t>(at));
      const Vec plain = gradient(at, lanes), special = hit ? plain - a.target_share[r] : plain;
      for_lanes(a.classes, [&](int64_t i, int64_t n) { store_some(out + i, gradient(i, n), n); });
      store_some(out + at, special, lanes);
    }
  });
}

}  // namespace

extern const CrossEntropyBodies cross_entropy_bodies;
const CrossEntropyBodies cross_entropy_bodies = {{forward<float>, forward<bf16>},
                                                 {backward<float>, backward<bf16>}};

}  // namespace GPTCORE_ISA_NS
}  // namespace gptcore
