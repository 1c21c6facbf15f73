// The kernels of core/loss_rows.h: a block a row. The row's maximum, sum of exponentials and what else is asked for come
// from one pass over its logits, the gradient from a second, which finds most of them in the caches.
#pragma once

#include "core/cuda/pack.cuh"
#include "core/cuda/reduce.cuh"
#include "core/loss_rows.h"

namespace gptcore::cuda {
namespace {

// Threads of a block: so many that 8 packs a thread take the row, at least a warp, at most what keeps two blocks on a
// multiprocessor with room for registers.
inline int loss_threads(int64_t classes) {
  int threads = 32;
  while (threads < 512 && threads * 32 < classes) threads *= 2;
  return threads;
}

__device__ __forceinline__ float at(const ClassVector& v, int64_t i) {
  return v.bf16 ? to_float(static_cast<const bf16*>(v.data)[i]) : static_cast<const float*>(v.data)[i];
}

// exp sums relative to the largest logit so far, and for the entropy the same of (l - max) exp(l - max).
struct SoftmaxSums {
  float max = -INFINITY, sum = 0.0f, weighted = 0.0f;
  int64_t place = INT64_MAX;  // the first class of the largest logit

  __device__ void rescale(float to) {
    if (max == to || sum == 0.0f) {
      max = to;
      return;
    }
    const float factor = expf(max - to);
    weighted = factor * (weighted + sum * (max - to));
    sum *= factor;
    max = to;
  }
  __device__ void add(float l) {
    if (l == -INFINITY) return;
    const float d = l - max, e = expf(d);
    sum += e;
    weighted += d == 0.0f ? 0.0f : d * e;
  }
  __device__ void join(const SoftmaxSums& other) {
    const bool no_number = max != max || other.max != other.max;
    if (other.place < place && !(other.max < max)) place = other.place;
    if (other.max > max) place = other.place;
    const float to = fmaxf(max, other.max);
    SoftmaxSums scaled = other;
    scaled.rescale(to);
    rescale(to);
    sum += scaled.sum, weighted += scaled.weighted;
    if (no_number) sum = NAN;
  }
};

__device__ __forceinline__ SoftmaxSums from_lane(const SoftmaxSums& s, int step) {
  SoftmaxSums other;
  other.max = __shfl_xor_sync(kFullMask, s.max, step);
  other.sum = __shfl_xor_sync(kFullMask, s.sum, step);
  other.weighted = __shfl_xor_sync(kFullMask, s.weighted, step);
  other.place = __shfl_xor_sync(kFullMask, s.place, step);
  return other;
}

// The block's sums, in every thread. Lower lanes' and warps' come first, so that all agree to the bit.
__device__ __forceinline__ SoftmaxSums block_sums(SoftmaxSums s, SoftmaxSums* room) {
  for (int step = 1; step < kWarp; step *= 2) {
    SoftmaxSums other = from_lane(s, step);
    if (lane() & step) {
      other.join(s);
      s = other;
    } else {
      s.join(other);
    }
  }
  const int warps = static_cast<int>(blockDim.x) / kWarp;
  if (lane() == 0) room[warp()] = s;
  __syncthreads();
  s = room[0];
  for (int w = 1; w < warps; ++w) s.join(room[w]);
  __syncthreads();
  return s;
}

// What lies between products and logits.
struct Logit {
  float scale, soft_cap;
  ClassVector bias;
  bool plain;

  __device__ explicit Logit(const LossRows& a)
      : scale(a.scale),
        soft_cap(a.soft_cap),
        bias(a.bias),
        plain(a.scale == 1.0f && a.soft_cap == 0.0f && !a.bias.data) {}
  __device__ float operator()(float product, int64_t c) const {
    if (plain) return product;
    float l = scale * (bias.data ? product + at(bias, c) : product);
    return soft_cap != 0.0f ? soft_cap * tanhf(l / soft_cap) : l;
  }
  // The derivative by the product, at the logit l.
  __device__ float slope(float l) const {
    if (plain) return 1.0f;
    const float share = soft_cap != 0.0f ? l / soft_cap : 0.0f;
    return scale * (1.0f - share * share);
  }
};

// body(c, products, count) over the row's packs, then over what is left of it one by one.
template <class T, class Body>
__device__ __forceinline__ void for_row(const T* row, int64_t classes, const Body& body) {
  constexpr int n = kPackElements<T>;
  int64_t done = 0;
  if (can_pack<T>(row, 0)) {
    done = classes / n * n;
    for (int64_t c = int64_t{threadIdx.x} * n; c < done; c += int64_t{blockDim.x} * n) {
      float values[n];
      load_pack(row + c, values);
      body(c, values, n);
    }
  }
  for (int64_t c = done + threadIdx.x; c < classes; c += blockDim.x) {
    float values[n];
    values[0] = to_float(row[c]);
    body(c, values, 1);
  }
}

struct RowSums {
  SoftmaxSums softmax;
  float weighted_logits = 0.0f;  // sum of class_weight * logit, for smoothing
};

template <class T>
__device__ __forceinline__ RowSums row_sums(const LossRows& a, const T* row, const Logit& logit,
                                            float* room) {
  RowSums sums;
  for_row(row, a.classes, [&](int64_t c, float (&values)[kPackElements<T>], int count) {
    SoftmaxSums& s = sums.softmax;
#pragma unroll
    for (int i = 0; i < kPackElements<T>; ++i) {
      if (i < count) values[i] = logit(values[i], c + i);
    }
    float largest = values[0];
#pragma unroll
    for (int i = 1; i < kPackElements<T>; ++i) {
      if (i < count) largest = values[i] > largest || values[i] != values[i] ? values[i] : largest;
    }
    if (!(largest <= s.max)) {  // NaN too
      s.rescale(largest);
      s.place = INT64_MAX;
#pragma unroll
      for (int i = kPackElements<T> - 1; i >= 0; --i) {
        if (i < count && values[i] == largest) s.place = c + i;
      }
    } else if (s.max == largest && s.place == INT64_MAX) {
      s.place = c;  // nothing but -inf so far
    }
#pragma unroll
    for (int i = 0; i < kPackElements<T>; ++i) {
      if (i >= count) continue;
      s.add(values[i]);
      if (a.smoothing > 0)
        sums.weighted_logits += a.class_weight.data ? at(a.class_weight, c + i) * values[i] : values[i];
    }
  });
  sums.softmax = block_sums(sums.softmax, reinterpret_cast<SoftmaxSums*>(room + kWarp));
  if (a.smoothing > 0) {
    sums.weighted_logits = block_reduce(sums.weighted_logits, room);
    __syncthreads();
  }
  return sums;
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
  const auto gradient = [&](float product, int64_t c) {
    if (!counts) return 0.0f;
    const float l = logit(product, c);
    float d = softmax * expf(l - lse);
    if (a.smoothing > 0) d -= a.class_weight.data ? uniform * at(a.class_weight, c) : uniform;
    if (c == target) d -= share;
    return d * logit.slope(l);
  };
  constexpr int n_pack = kPackElements<T>;
  for_row(row, a.classes, [&](int64_t c, float (&values)[n_pack], int count) {
#pragma unroll
    for (int i = 0; i < n_pack; ++i) {
      if (i < count) values[i] = gradient(values[i], c + i);
    }
    if (count == n_pack && (reinterpret_cast<uintptr_t>(out + c) % (n_pack * sizeof(G))) == 0) {
      struct alignas(n_pack * sizeof(G)) Together {
        G at[n_pack];
      } together;
#pragma unroll
      for (int i = 0; i < n_pack; ++i) together.at[i] = from_float<G>(values[i]);
      *reinterpret_cast<Together*>(out + c) = together;
    } else {
      for (int i = 0; i < count; ++i) out[c + i] = from_float<G>(values[i]);
    }
  });
}

template <class T, class G>
__global__ void __launch_bounds__(512, 2) loss_rows(const LossRows a) {
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
    const RowSums sums = row_sums(a, row, logit, room);
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
                s.place == INT64_MAX ? 0 : s.place, w * loss, w * a.z_loss * wide * wide);
    }
  }
  if (a.dlogits) store_gradient<T, G>(a, n, row, logit, wrong ? NAN : lse, here ? target : -1, true);
}

template <class T, class G>
void run_loss_rows(const LossRows& a) {
  const auto threads = static_cast<unsigned>(loss_threads(a.classes));
  launch<&loss_rows<T, G>>({dim3(static_cast<unsigned>(a.rows)), dim3(threads), kLossShared}, a);
}

// --- sums over rows: one block, in a fixed order ----------------------------------------------------------------

constexpr int kSumThreads = 512;

// The sum of what `value` says of 0 to count - 1, in thread 0.
template <class Value>
__device__ __forceinline__ double block_total(int64_t count, double* room, const Value& value) {
  double sum = 0.0;
  for (int64_t i = threadIdx.x; i < count; i += kSumThreads) sum += value(i);
  room[threadIdx.x] = sum;
  for (int half = kSumThreads / 2; half > 0; half /= 2) {
    __syncthreads();
    if (static_cast<int>(threadIdx.x) < half) room[threadIdx.x] += room[threadIdx.x + half];
  }
  __syncthreads();
  const double total = room[0];
  __syncthreads();
  return total;
}

__global__ void __launch_bounds__(kSumThreads, 1) loss_divisors(const LossDivisors a) {
  double* room = shared_memory<double>();
  const auto weight = [&](int64_t n) { return a.token_weight ? a.token_weight[n] : 1.0f; };
  const auto counts = [&](int64_t n) { return a.targets[n] != a.ignore_index; };
  double loss = 1.0, z = 1.0;
  if (a.mean) {
    loss = block_total(a.rows, room, [&](int64_t n) {
      if (!counts(n)) return 0.0;
      const int64_t t = a.targets[n];
      const bool known = t >= 0 && t < a.classes;
      return static_cast<double>(weight(n)) * (a.class_weight.data && known ? at(a.class_weight, t) : 1.0f);
    });
    z = block_total(a.rows, room,
                    [&](int64_t n) { return counts(n) ? static_cast<double>(weight(n)) : 0.0; });
  }
  double classes = static_cast<double>(a.classes);
  if (a.class_weight.data) {
    classes =
        block_total(a.classes, room, [&](int64_t c) { return static_cast<double>(at(a.class_weight, c)); });
  }
  if (threadIdx.x == 0) a.divisors[0] = loss, a.divisors[1] = z, a.divisors[2] = classes;
}

__device__ __forceinline__ void store_loss(const LossTotals& a, int64_t place, double value) {
  if (a.bf16_loss) {
    static_cast<bf16*>(a.loss)[place] = from_float<bf16>(static_cast<float>(value));
  } else {
    static_cast<float*>(a.loss)[place] = static_cast<float>(value);
  }
}

__global__ void __launch_bounds__(kSumThreads, 1) loss_totals(const LossTotals a) {
  double* room = shared_memory<double>();
  if (a.per_row) {
    const int64_t n = int64_t{blockIdx.x} * kSumThreads + threadIdx.x;
    if (n >= a.rows) return;
    store_loss(a, n * a.loss_stride, a.row_loss[n]);
    if (a.z) static_cast<float*>(a.z)[n * a.z_stride] = static_cast<float>(a.row_z[n]);
    return;
  }
  const double loss = block_total(a.rows, room, [&](int64_t n) { return a.row_loss[n]; });
  if (threadIdx.x == 0) store_loss(a, 0, loss / a.divisors[0]);
  if (!a.z) return;
  const double z = block_total(a.rows, room, [&](int64_t n) { return a.row_z[n]; });
  if (threadIdx.x == 0) *static_cast<float*>(a.z) = static_cast<float>(z / a.divisors[1]);
}

inline void run_loss_divisors(const LossDivisors& a) {
  launch<&loss_divisors>({dim3(1), dim3(kSumThreads), kSumThreads * sizeof(double)}, a);
}

inline void run_loss_totals(const LossTotals& a) {
  const int64_t blocks = a.per_row ? (a.rows + kSumThreads - 1) / kSumThreads : 1;
  launch<&loss_totals>({dim3(static_cast<unsigned>(blocks)), dim3(kSumThreads), kSumThreads * sizeof(double)},
                       a);
}

}  // namespace
}  // namespace gptcore::cuda
