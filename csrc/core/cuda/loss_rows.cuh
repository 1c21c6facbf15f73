// The row kernels of core/loss_rows.h: a block a row. Its maximum, sum of exponentials and what else is asked for come
// from one pass over its logits, the gradient from a second, which finds most of them in the caches.
#pragma once

#include "core/cuda/logits.cuh"
#include "core/cuda/reduce.cuh"
#include "core/cuda/softmax_sums.cuh"

namespace gptcore::cuda {
namespace {

// Threads of a block: so many that 8 packs a thread take the row, at least a warp, at most what puts four blocks on a
// multiprocessor: what is done once a row, by every thread, is then little beside its packs.
constexpr int kLossThreads = 256;
inline int loss_threads(int64_t classes) {
  int threads = 32;
  while (threads < kLossThreads && threads * 32 < classes) threads *= 2;
  return threads;
}

struct RowSums {
  SoftmaxSums softmax;
  float weighted_logits = 0.0f;  // sum of class_weight * logit, for smoothing
};

// What is the same for the whole row is decided once a pack.
template <class T, bool statistics>
__device__ __forceinline__ RowSums row_sums(const LossRows& a, const T* row, const Logit& logit,
                                            float* room) {
  RowSums sums;
  const bool smooth = a.smoothing > 0;
  for_row(row, a.classes, [&](int64_t c, float (&values)[kPackElements<T>], int count) {
    SoftmaxSums& s = sums.softmax;
    logit.replace(values, c, count);
    float largest = values[0];
#pragma unroll
    for (int i = 1; i < count; ++i) largest = fmaxf(largest, values[i]);
    if constexpr (statistics) {
      if (largest > s.max || (largest == s.max && c < s.place)) s.place = c;
    }
    s.rescale<statistics>(fmaxf(s.max, largest));
    const float base = s.base();
#pragma unroll
    for (int i = 0; i < count; ++i) {
      const float d = values[i] - base, e = exp_approximate(d);
      s.sum += e;
      if constexpr (statistics) s.weighted += s.bounded(d) * e;
    }
    if (!smooth) return;
#pragma unroll
    for (int i = 0; i < count; ++i)
      sums.weighted_logits += a.class_weight.data ? at(a.class_weight, c + i) * values[i] : values[i];
  });
  sums.softmax = block_sums<statistics>(sums.softmax, reinterpret_cast<SoftmaxSums*>(room + kWarp));
  if (smooth) sums.weighted_logits = block_reduce(sums.weighted_logits, room);
  return sums;
}

// The first class of the largest logit, where a pack (or less) from `place` on has it.
template <class T>
__device__ __forceinline__ int64_t largest_class(const LossRows& a, const T* row, const Logit& logit,
                                                 int64_t place) {
  if (place == INT64_MAX) return 0;
  int64_t best = place;
  float largest = logit(to_float(row[place]), place);
  for (int64_t c = place + 1; c < a.classes && c < place + kPackElements<T>; ++c) {
    const float l = logit(to_float(row[c]), c);
    if (l > largest) largest = l, best = c;
  }
  return best;
}

constexpr int64_t kLossShared = kWarp * (sizeof(float) + sizeof(SoftmaxSums));

// How the row's target and all classes count in its loss, before its token's weight.
struct RowShares {
  double target, even, all;  // of the target; of each class; of lse

  __device__ RowShares(const LossRows& a, int64_t target_class, double class_sum) {
    target = (1.0 - a.smoothing) * (a.class_weight.data ? at(a.class_weight, target_class) : 1.0f);
    even = a.smoothing / static_cast<double>(a.all_classes);
    all = a.class_weight.data ? target + even * class_sum : 1.0;
  }
};

__device__ __forceinline__ void store_row(const LossRows& a, int64_t n, float lse, float logprob,
                                          float entropy, int64_t predicted, double loss, double z) {
  if (a.lse && !a.lse_given) a.lse[n] = lse;
  if (a.logprobs) a.logprobs[n] = logprob;
  if (a.entropy) a.entropy[n] = entropy;
  if (a.predicted) a.predicted[n] = predicted;
  if (a.row_loss) a.row_loss[n] = loss;
  if (a.row_z) a.row_z[n] = z;
}

__device__ __forceinline__ float gradient_at(const ClassVector& g, int64_t place, float missing) {
  return g.data ? at(g, place) : missing;
}

// exp of what is below 0, as exact as the gradient's type asks for.
template <class G>
__device__ __forceinline__ float probability(float d) {
  if constexpr (sizeof(G) == sizeof(float)) return expf(d);
  return exp_approximate(d);
}

// dlogits of the row: (softmax p - uniform class_weight - [target] target) times the slope.
template <class T, class G>
__device__ __forceinline__ void store_gradient(const LossRows& a, int64_t n, const T* row, const Logit& logit,
                                               float lse, int64_t target, bool counts) {
  G* out = static_cast<G*>(a.dlogits) + n * a.out_stride;
  float softmax = 0.0f, share = 0.0f, uniform = 0.0f;
  if (counts) {
    const int64_t place = a.grad_per_row ? n * a.grad_stride : 0;
    const double w = a.token_weight ? a.token_weight[n] : 1.0f;
    const double g = w * gradient_at(a.grad_loss, place, a.missing) / a.divisors[0];
    const double gz = w * gradient_at({a.grad_z, false}, place, a.missing) / a.divisors[1];
    const RowShares shares(a, a.slice ? 0 : target, a.divisors[2]);
    softmax = static_cast<float>(g * shares.all + (a.z_loss != 0 ? gz * 2.0 * a.z_loss * lse : 0.0));
    share = static_cast<float>(g * shares.target);
    uniform = static_cast<float>(g * shares.even);
  }
  const bool smooth = a.smoothing > 0;
  constexpr int n_pack = kPackElements<T>;
  for_row(row, a.classes, [&](int64_t c, float (&values)[n_pack], int count) {
    logit.replace(values, c, count);
    float d[n_pack];
#pragma unroll
    for (int i = 0; i < count; ++i) d[i] = counts ? softmax * probability<G>(values[i] - lse) : 0.0f;
    if (smooth && counts) {
#pragma unroll
      for (int i = 0; i < count; ++i)
        d[i] -= a.class_weight.data ? uniform * at(a.class_weight, c + i) : uniform;
    }
    if (c <= target && target < c + count && counts) {
#pragma unroll
      for (int i = 0; i < count; ++i) {
        if (c + i == target) d[i] -= share;
      }
    }
    if (!logit.plain && counts) {
#pragma unroll
      for (int i = 0; i < count; ++i) d[i] *= logit.slope(values[i]);
    }
    if (count == n_pack && (reinterpret_cast<uintptr_t>(out + c) % (n_pack * sizeof(G))) == 0) {
      struct alignas(n_pack * sizeof(G)) Together {
        G at[n_pack];
      } together;
#pragma unroll
      for (int i = 0; i < n_pack; ++i) together.at[i] = from_float<G>(d[i]);
      *reinterpret_cast<Together*>(out + c) = together;
    } else {
      for (int i = 0; i < count; ++i) out[c + i] = from_float<G>(d[i]);
    }
  });
}

template <class T, class G, bool statistics>
__global__ void __launch_bounds__(kLossThreads, 4) loss_rows(const LossRows a) {
  float* room = shared_memory<float>();
  const int64_t n = blockIdx.x, target = a.targets[n] - a.first_class;
  const T* row = static_cast<const T*>(a.logits) + n * a.stride;
  const Logit logit(a);
  const bool ignored = a.targets[n] == a.ignore_index;
  const bool here = target >= 0 && target < a.classes;
  const bool wrong = !ignored && (a.targets[n] < 0 || a.targets[n] >= a.all_classes);
  if (ignored) {
    if (threadIdx.x == 0) store_row(a, n, 0.0f, 0.0f, 0.0f, -1, 0.0, 0.0);
    if (a.dlogits) store_gradient<T, G>(a, n, row, logit, 0.0f, target, false);
    return;
  }
  float lse = a.lse_given ? a.lse[n] : 0.0f;
  if (!a.lse_given) {
    const RowSums sums = row_sums<T, statistics>(a, row, logit, room);
    const SoftmaxSums& s = sums.softmax;
    const float log_sum = logf(s.sum);
    lse = wrong ? NAN : s.sum == 0.0f ? -INFINITY : s.max + log_sum;
    if (threadIdx.x == 0) {
      const float target_logit = here ? logit(to_float(row[target]), target) : 0.0f;
      const RowShares shares(a, here ? target : 0, a.divisors[2]);
      const double w = a.token_weight ? a.token_weight[n] : 1.0f, wide = lse;
      double loss =
          (a.slice ? 0.0 : shares.all * wide) - (shares.target != 0 ? shares.target * target_logit : 0.0);
      if (a.smoothing > 0) loss -= shares.even * sums.weighted_logits;
      store_row(a, n, lse, target_logit - (a.slice ? 0.0f : lse), log_sum - s.weighted / s.sum,
                a.predicted ? largest_class(a, row, logit, s.place) : 0, w * loss,
                w * a.z_loss * wide * wide);
    }
  }
  if (a.dlogits) store_gradient<T, G>(a, n, row, logit, wrong ? NAN : lse, here ? target : -1, true);
}

template <class T, class G>
void run_loss_rows(const LossRows& a) {
  const auto threads = static_cast<unsigned>(loss_threads(a.classes));
  const Launch shape = {dim3(static_cast<unsigned>(a.rows)), dim3(threads), kLossShared};
  a.entropy || a.predicted ? launch<&loss_rows<T, G, true>>(shape, a)
                           : launch<&loss_rows<T, G, false>>(shape, a);
}

}  // namespace
}  // namespace gptcore::cuda
