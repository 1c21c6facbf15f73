#include "core/arena.h"
#include "core/log.h"
#include "core/parallel.h"
#include "core/simd.h"
#include "core/transpose.h"
#include "kernels/moe_router/moe_router_body.h"

namespace gptcore {
namespace GPTCORE_ISA_NS {
namespace {

// Tokens lie in the lanes and experts one after another, so that softmax, the choice and all sums are vertical:
// with 8 experts a vector along them would be half empty, and each of a token's reductions a chain of shuffles.

// Below this many logits a parallel loop costs more than it saves.
constexpr int64_t kGrainElements = 4096;

// Logits of `count` tokens, (E, kLanes); lanes from count on are 0.
template <class T>
GPTCORE_INLINE void load_tile(const T* rows, int64_t stride, int64_t count, int64_t experts, float* tile) {
  for_lanes(experts, [&](int64_t e, int64_t n) {
    Vec block[kLanes];
#pragma GCC unroll 16
    for (int i = 0; i < kLanes; ++i) block[i] = i < count ? load_some(rows + i * stride + e, n) : Vec{};
    transpose(block);
#pragma GCC unroll 16
    for (int i = 0; i < kLanes; ++i) {
      if (i < n) store(tile + (e + i) * kLanes, block[i]);
    }
  });
}

// And back: what lies in lanes from count on is left.
template <class T>
GPTCORE_INLINE void store_tile(const float* tile, int64_t experts, T* rows, int64_t stride, int64_t count) {
  for_lanes(experts, [&](int64_t e, int64_t n) {
    Vec block[kLanes];
#pragma GCC unroll 16
    for (int i = 0; i < kLanes; ++i) block[i] = i < n ? load(tile + (e + i) * kLanes) : Vec{};
    transpose(block);
#pragma GCC unroll 16
    for (int i = 0; i < kLanes; ++i) {
      if (i < count) store_some(rows + i * stride + e, block[i], n);
    }
  });
}

// -1 in the lanes of tokens that count.
GPTCORE_INLINE VecI valid_lanes(const uint8_t* mask, int64_t first, int64_t count) {
  int32_t valid[kLanes] = {};
  for (int64_t i = 0; i < count; ++i) valid[i] = mask == nullptr || mask[first + i] ? -1 : 0;
  VecI lanes;
  __builtin_memcpy(&lanes, valid, sizeof(lanes));
  return lanes;
}

// The K largest of each lane, by insertion: larger first, of equals the lower expert.
template <int kFixed>
GPTCORE_INLINE void choose(const float* tile, int64_t experts, int64_t choices, Vec* best, VecI* index) {
  const int64_t top = kFixed > 0 ? kFixed : choices;
  const Vec lowest = splat(-__builtin_inff());
  for (int64_t k = 0; k < top; ++k) best[k] = lowest, index[k] = splat_int(0x7fffffff);
  for (int64_t e = 0; e < experts; ++e) {
    const Vec loaded = load(tile + e * kLanes);
    Vec x = loaded == loaded ? loaded : lowest;
    VecI at = splat_int(static_cast<int32_t>(e));
    for (int64_t k = 0; k < top; ++k) {
      const VecI ahead = (x > best[k]) | ((x == best[k]) & (at < index[k]));
      const Vec lost = ahead ? best[k] : x;
      const VecI lost_at = ahead ? index[k] : at;
      best[k] = ahead ? x : best[k], index[k] = ahead ? at : index[k];
      x = lost, at = lost_at;
    }
  }
}

GPTCORE_INLINE void choose_any(const float* tile, int64_t experts, int64_t choices, Vec* best, VecI* index) {
  if (choices == 1) {
    choose<1>(tile, experts, choices, best, index);
  } else if (choices == 2) {
    choose<2>(tile, experts, choices, best, index);
  } else {
    choose<0>(tile, experts, choices, best, index);
  }
}

// Turns a tile of logits into exponentials relative to `top`; their sum, and the sum of exponential times distance.
GPTCORE_INLINE void exponentials(float* tile, int64_t experts, Vec top, Vec* sum, Vec* weighted) {
  Vec total = {}, moment = {};
  for (int64_t e = 0; e < experts; ++e) {
    const Vec distance = load(tile + e * kLanes) - top, x = exp(distance);
    store(tile + e * kLanes, x);
    total += x;
    moment += x > 0.0f ? x * distance : Vec{};  // 0 times -inf
  }
  *sum = total, *weighted = moment;
}

GPTCORE_INLINE void store_choices(const MoeRouterForward& a, int64_t first, int64_t count, VecI valid,
                                  const Vec* gates, const VecI* index, int32_t* counts) {
  for (int64_t k = 0; k < a.choices; ++k) {
    const Vec gate = valid ? gates[k] : Vec{};
    const VecI chosen = valid ? index[k] : splat_int(-1);
    int32_t* const asked = counts + (k == 0 ? 0 : a.experts);
    for (int64_t i = 0; i < count; ++i) {
      const int32_t expert = chosen[i];
      a.gates[(first + i) * a.choices + k] = gate[i];
      a.chosen[(first + i) * a.choices + k] = expert;
      if (expert >= 0) ++asked[expert];
    }
  }
}

// kLanes tokens; adds to the sums of their chunk.
template <class T>
GPTCORE_INLINE void forward_tile(const MoeRouterForward& a, int64_t first, int64_t count, float* tile,
                                 float* probabilities, Vec* z, Vec* entropy, int32_t* counts) {
  Vec best[kMostChoices];
  VecI index[kMostChoices];
  load_tile(static_cast<const T*>(a.logits) + first * a.stride, a.stride, count, a.experts, tile);
  choose_any(tile, a.experts, a.choices, best, index);
  const Vec top = best[0];
  Vec sum, weighted;
  exponentials(tile, a.experts, top, &sum, &weighted);
  const VecI valid = valid_lanes(a.mask, first, count);
  const Vec inverse = 1.0f / sum, spread = log(sum), lse = top + spread;
  for (int64_t e = 0; e < a.experts; ++e) {
    const Vec p = load(tile + e * kLanes) * inverse;
    store(probabilities + e * kLanes, load(probabilities + e * kLanes) + (valid ? p : Vec{}));
  }
  *z += valid ? lse * lse : Vec{};
  *entropy += valid ? spread - weighted * inverse : Vec{};

  Vec chosen_sum = {};
  for (int64_t k = 0; k < a.choices; ++k) best[k] = exp(best[k] - top), chosen_sum += best[k];
  const Vec divisor = a.renormalise ? chosen_sum + (sum - sum) : sum;  // NaN where any logit is
  for (int64_t k = 0; k < a.choices; ++k) best[k] = best[k] / divisor;
  store_choices(a, first, count, valid, best, index, counts);
  store_some(a.lse + first, lse, count);
  store_some(a.top_probability + first, inverse, count);
}

template <class T>
void forward(const MoeRouterForward& a) {
  const int64_t chunks = (a.tokens + a.chunk - 1) / a.chunk;
  parallel_for(chunks, [&](int64_t task, int) {
    const Scratch scratch(static_cast<size_t>(2 * a.experts) * sizeof(Vec));
    float *tile = scratch.as<float>(), *probabilities = tile + a.experts * kLanes;
    for (int64_t e = 0; e < a.experts; ++e) store(probabilities + e * kLanes, Vec{});
    Vec z = {}, entropy = {};
    int32_t* counts = a.counts + task * 2 * a.experts;
    __builtin_memset(counts, 0, static_cast<size_t>(2 * a.experts) * sizeof(int32_t));
    const int64_t begin = task * a.chunk, end = begin + a.chunk < a.tokens ? begin + a.chunk : a.tokens;
    for (int64_t first = begin; first < end; first += kLanes) {
      const int64_t count = first + kLanes < end ? int64_t{kLanes} : end - first;
      forward_tile<T>(a, first, count, tile, probabilities, &z, &entropy, counts);
    }
    for (int64_t e = 0; e < a.experts; ++e) {
      a.probabilities[task * a.experts + e] = reduce_add(load(probabilities + e * kLanes));
    }
    a.z_and_entropy[2 * task] = reduce_add(z), a.z_and_entropy[2 * task + 1] = reduce_add(entropy);
  });
}

// What the gates of kLanes tokens add to the gradient of their chosen logits, by choice; returns what they take from
// every logit for each unit of its probability. Renormalised gates are a softmax of their own over the chosen
// logits, which adds up to nothing; others are probabilities. Lanes of padding hold anything.
template <int kFixed>
GPTCORE_INLINE Vec gate_gradients(const MoeRouterBackward& a, int64_t first, int64_t count, const float* tile,
                                  Vec* share) {
  const int64_t choices = kFixed > 0 ? kFixed : a.choices;
  Vec gradient[kFixed > 0 ? kFixed : kMostChoices], sum = {}, dot = {};
  for (int64_t k = 0; k < choices; ++k) {
    float p[kLanes] = {}, g[kLanes] = {};
    for (int64_t i = 0; i < count; ++i) {
      const int64_t at = (first + i) * choices + k;
      const int32_t expert = a.chosen[at];
      p[i] = tile[(expert < 0 ? 0 : expert) * kLanes + i];
      g[i] = a.rows[at] < 0 ? 0.0f : a.dgates[at];
    }
    share[k] = load(p), gradient[k] = load(g);
    sum += share[k], dot += share[k] * gradient[k];
  }
  const Vec scale = a.renormalise ? 1.0f / sum : Vec{} + 1.0f, mean = a.renormalise ? dot * scale : Vec{};
  for (int64_t k = 0; k < choices; ++k) share[k] = share[k] * scale * (gradient[k] - mean);
  return a.renormalise ? Vec{} : dot;
}

// kLanes tokens, in a tile that goes from logits over probabilities to gradients.
template <class T, int kFixed>
GPTCORE_INLINE void backward_tile(const MoeRouterBackward& a, int64_t first, int64_t count, float* tile) {
  const int64_t choices = kFixed > 0 ? kFixed : a.choices;
  load_tile(static_cast<const T*>(a.logits) + first * a.stride, a.stride, count, a.experts, tile);
  const Vec lse = load_some(a.lse + first, count);
  Vec dot = {};
  for (int64_t e = 0; e < a.experts; ++e) {
    const Vec p = exp(load(tile + e * kLanes) - lse);
    store(tile + e * kLanes, p);
    dot += p * a.balance_factor[e];
  }
  Vec share[kFixed > 0 ? kFixed : kMostChoices];
  if (a.dgates) dot += gate_gradients<kFixed>(a, first, count, tile, share);
  int32_t counts[kLanes] = {};
  for (int64_t i = 0; i < count; ++i) counts[i] = a.chosen[(first + i) * choices] < 0 ? 0 : -1;
  VecI valid;
  __builtin_memcpy(&valid, counts, sizeof(valid));
  const Vec all = lse * a.z_factor - dot;
  for (int64_t e = 0; e < a.experts; ++e) {
    const Vec gradient = load(tile + e * kLanes) * (all + a.balance_factor[e]);
    store(tile + e * kLanes, valid ? gradient : Vec{});
  }
  for (int64_t k = 0; a.dgates && k < choices; ++k) {
    for (int64_t i = 0; i < count; ++i) {
      const int32_t expert = a.chosen[(first + i) * choices + k];
      if (expert >= 0) tile[expert * kLanes + i] += share[k][i];
    }
  }
  store_tile(tile, a.experts, static_cast<T*>(a.dlogits) + first * a.out_stride, a.out_stride, count);
}

template <class T, int kFixed>
void backward_of(const MoeRouterBackward& a) {
  // Tasks rather than a range for each thread: one that sleeps, as after a forward pass it does, wakes too late for its
  // half of so little work.
  const int64_t tokens = (kGrainElements / (a.experts * kLanes) + 1) * kLanes;
  parallel_for((a.tokens + tokens - 1) / tokens, [&](int64_t task, int) {
    const Scratch scratch(static_cast<size_t>(a.experts) * sizeof(Vec));
    float* tile = scratch.as<float>();
    const int64_t begin = task * tokens, end = begin + tokens < a.tokens ? begin + tokens : a.tokens;
    for (int64_t first = begin; first < end; first += kLanes) {
      backward_tile<T, kFixed>(a, first, first + kLanes < end ? int64_t{kLanes} : end - first, tile);
    }
  });
}

template <class T>
void backward(const MoeRouterBackward& a) {
  if (a.choices == 2) {
    backward_of<T, 2>(a);
  } else {
    backward_of<T, 0>(a);
  }
}

}  // namespace

extern const MoeRouterBodies moe_router_bodies;
const MoeRouterBodies moe_router_bodies = {{forward<float>, forward<bf16>},
                                           {backward<float>, backward<bf16>}};

}  // namespace GPTCORE_ISA_NS
}  // namespace gptcore
