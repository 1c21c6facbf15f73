// What may lie between the products q . k and their softmax. Runs over scores in cache, a pass for each of what
// is asked for, and leaves them in powers of two: scaled and times log2(e), so that the softmax behind it is
// the plain one with scale 1. Plain attention pays one branch per row and block.
#pragma once

#include <cstdint>

#include "core/simd.h"
#include "kernels/attention/mask_range.h"
#include "kernels/attention/softmax.h"

namespace gptcore {
namespace GPTCORE_ISA_NS {
namespace {

// While one lives on a thread, numbers below f32's normal range count as zeros. Biases spread scores so far that many
// probabilities lie there, patterns hide by -inf, and each would take the processor over a hundred cycles.
class FlushDenormals {
 public:
#if defined(__SSE2__)
  explicit FlushDenormals(bool flush) : before_(_mm_getcsr()) {
    if (flush) _mm_setcsr(before_ | 0x8040u);  // FTZ and DAZ
  }
  ~FlushDenormals() { _mm_setcsr(before_); }

 private:
  unsigned before_;
#else
  explicit FlushDenormals(bool) {}
#endif
};

// Up to here tanh is an odd polynomial, at half the cost of the quotient that serves everywhere. Scores are
// usually far below their cap.
constexpr float kSmallTanh = 0.5f;

// cap tanh y for |y| <= kSmallTanh: y times a minimax polynomial in y^2 (relative error 1.4e-8, or 5.5e-7 where bf16
// follows, as in exp2_of). The cap is a factor of the coefficients, which costs nothing within a loop.
template <bool kFine>
GPTCORE_INLINE Vec small_tanh(Vec y, float cap) {
  const Vec z = y * y;
  Vec p;
  if constexpr (kFine) {
    p = z * (0.01713529f * cap) - 0.05298623f * cap;
    p = p * z + 0.13324782f * cap;
    p = p * z - 0.3333307f * cap;
    p = p * z + cap;
  } else {
    p = z * (-0.04440312f * cap) + 0.13190336f * cap;
    p = p * z - 0.33326323f * cap;
    p = p * z + 0.99999946f * cap;
  }
  return y * p;
}

// cap tanh y for any y: y P(y^2) / Q(y^2), minimax (relative error 1.5e-8, or 1.3e-6), constant from where tanh is 1
// to that precision.
template <bool kFine>
GPTCORE_INLINE Vec any_tanh(Vec y, float cap) {
  y = clamp(y, kFine ? 8.7f : 7.2f);
  const Vec z = y * y;
  Vec p, q;
  if constexpr (kFine) {
    p = z * (1.3897400e-8f * cap) + 2.0993662e-5f * cap;
    p = p * z + 0.0035187335f * cap;
    p = p * z + 0.13400458f * cap;
    p = p * z + cap;
    q = z * 7.9964320e-7f + 0.00033236309f;
    q = q * z + 0.025964854f;
    q = q * z + 0.46733778f;
  } else {
    p = z * (3.8877696e-6f * cap) + 0.0022704759f * cap;
    p = p * z + 0.12297025f * cap;
    p = p * z + 0.99999873f * cap;
    q = z * 0.00014151132f + 0.021046877f;
    q = q * z + 0.45629422f;
  }
  q = q * z + 1.0f;
  return y * p * reciprocal(q);
}

// put(i, n, cap * tanh(inner * x[i...])) for the first n lanes, over [0, count) by vectors.
template <bool kFine, class Put>
GPTCORE_INLINE void cap_each(const float* x, int64_t count, float inner, float cap, const Put& put) {
  constexpr int kVectors = 4;  // looked at together, so that the branch costs little
  bool large = false;          // once met: what follows is seldom all small, and looking costs a tenth
  int64_t i = 0;
  for (; i + kVectors * kLanes <= count; i += kVectors * kLanes) {
    Vec y[kVectors];
#pragma GCC unroll 4
    for (int j = 0; j < kVectors; ++j) y[j] = load(x + i + j * kLanes) * inner;
    if (!large) {
      Vec top = {};
#pragma GCC unroll 4
      for (int j = 0; j < kVectors; ++j) top = larger(abs(y[j]), top);
      large = any_above(top, kSmallTanh);
    }
    if (large) {
#pragma GCC unroll 4
      for (int j = 0; j < kVectors; ++j) put(i + j * kLanes, int64_t{kLanes}, any_tanh<kFine>(y[j], cap));
    } else {
#pragma GCC unroll 4
      for (int j = 0; j < kVectors; ++j) put(i + j * kLanes, int64_t{kLanes}, small_tanh<kFine>(y[j], cap));
    }
  }
  for (; i < count; i += kLanes) {
    const int64_t n = at_most(count - i, kLanes);
    put(i, n, any_tanh<kFine>(load_some(x + i, n) * inner, cap));
  }
}

// x[i] = factor * x[i] - slope * |distance + i|
GPTCORE_INLINE void subtract_distance(float* x, int64_t count, float factor, float slope, float distance) {
  constexpr int kVectors = 4;  // a chain of additions for each vector would be what limits this
  Vec from = __builtin_convertvector(lane_index(), Vec) + distance;
  int64_t i = 0;
  for (; i + kVectors * kLanes <= count; i += kVectors * kLanes) {
#pragma GCC unroll 4
    for (int j = 0; j < kVectors; ++j) {
      float* at = x + i + j * kLanes;
      store(at, load(at) * factor - slope * abs(from + static_cast<float>(j * kLanes)));
    }
    from += static_cast<float>(kVectors * kLanes);
  }
  for (; i < count; i += kLanes, from += static_cast<float>(kLanes)) {
    const int64_t n = at_most(count - i, kLanes);
    store_some(x + i, load_some(x + i, n) * factor - slope * abs(from), n);
  }
}

GPTCORE_INLINE float slope_of(const AttentionProblem& p, const Sequence& s, int64_t row) {
  return p.slopes[s.index * p.slopes_batch + s.head_of(row) * p.slopes_head] * kLog2e;
}

// Starts the softmax of `count` rows with their heads' sinks: scores that are counted but lead to no value.
template <int kRows>
void add_sinks(const AttentionProblem& p, const Sequence& s, int64_t first, int64_t count,
               RowStates<kRows>* state) {
  for (int64_t r = 0; r < count; ++r) {
    const float sink = p.sinks[s.head_of(first + r)] * kLog2e;
    if (sink == -kInfinity) continue;
    state->raw_max[r] = state->shift[r] = sink;
    state->sum[r][0] = 1;
  }
}

// Bytes as integers, those beyond n as zeros.
GPTCORE_INLINE VecI load_bytes(const uint8_t* p, int64_t n) {
  uint8_t bytes[16] = {};
  if (n == kLanes) {
    __builtin_memcpy(bytes, p, kLanes);
  } else {
    __builtin_memcpy(bytes, p, static_cast<size_t>(n));
  }
#if defined(__AVX512F__)
  return (VecI)_mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(bytes)));
#elif defined(__AVX2__)
  return (VecI)_mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(bytes)));
#else
  VecI x = {};
  for (int i = 0; i < kLanes; ++i) x[i] = bytes[i];
  return x;
#endif
}

// A bias and a mask of a row's keys, in powers of two. Hidden is hidden whatever the score, which may be NaN.
GPTCORE_INLINE Vec add_bias(Vec x, float factor, Vec bias) {
  return bias == splat(-kInfinity) ? bias : x * factor + bias * kLog2e;
}
GPTCORE_INLINE Vec hide(Vec x, float factor, VecI seen) {
  return seen != VecI{} ? x * factor : splat(-kInfinity);
}

template <class T>
GPTCORE_INLINE void add_bias(float* x, int64_t count, float factor, const T* bias) {
  for_lanes(count, [&](int64_t i, int64_t n) {
    store_some(x + i, add_bias(load_some(x + i, n), factor, load_some(bias + i, n)), n);
  });
}

// The rows of bias and mask that a problem has.
class ScoreTerms {
 public:
  ScoreTerms(const AttentionProblem& p, const Sequence& s)
      : f32_({p.bias_16bit ? nullptr : p.bias.data, p.bias.batch, p.bias.token, p.bias.head}, s),
        bf16_({p.bias_16bit ? p.bias.data : nullptr, p.bias.batch, p.bias.token, p.bias.head}, s),
        mask_(p.mask, s) {}

  // To `count` scores of a row from `key` on, which lack `factor`.
  void add(int64_t row, int64_t key, float* x, int64_t count, float factor) const {
    if (f32_.base) add_bias(x, count, factor, f32_(row) + key);
    if (bf16_.base) add_bias(x, count, factor, bf16_(row) + key);
    if (!mask_.base) return;
    const uint8_t* mask = mask_(row) + key;
    const float left = f32_.base || bf16_.base ? 1 : factor;
    for_lanes(count, [&](int64_t i, int64_t n) {
      store_some(x + i, hide(load_some(x + i, n), left, load_bytes(mask + i, n)), n);
    });
  }

 private:
  QueryRows<const float> f32_;
  QueryRows<const bf16> bf16_;
  QueryRows<const uint8_t> mask_;
};

// The products of a row with the keys of a block, which begins at `base`; in place. Their scale lacks its sign:
// that is in the queries.
template <bool kFine>
__attribute__((noinline)) void modify_row(const AttentionProblem& p, const Sequence& s, int64_t row,
                                          int64_t base, float* scores, Range visible) {
  if (visible.empty()) return;
  const int64_t count = visible.end - visible.begin;
  float* x = scores + visible.begin;
  const float scale = p.scale < 0 ? -p.scale : p.scale;
  float factor = scale * kLog2e;
  if (p.soft_cap > 0) {
    cap_each<kFine>(x, count, scale / p.soft_cap, p.soft_cap * kLog2e,
                    [&](int64_t i, int64_t n, Vec capped) { store_some(x + i, capped, n); });
    factor = 1;
  }
  if (p.slopes) {
    const int64_t distance = base + visible.begin - s.place_of(row);
    subtract_distance(x, count, factor, slope_of(p, s, row), static_cast<float>(distance));
    factor = 1;
  }
  if (p.bias.data || p.mask.data) {
    ScoreTerms(p, s).add(row, base + visible.begin, x, count, factor);
  } else if (factor != 1) {  // sinks alone
    for_lanes(count, [&](int64_t i, int64_t n) { store_some(x + i, load_some(x + i, n) * factor, n); });
  }
}

// What backward, where rows are columns, knows of them; null where it is not asked for.
struct RowTerms {
  const float *place, *slope;
};

// The products of kKeys keys from `key` on with `count` rows, in place, a line each; cap_slopes becomes the soft
// cap's derivative. Returns the factor that they still lack: 1 where anything was done.
template <bool kFine, int kKeys>
__attribute__((noinline)) float modify_keys(const AttentionProblem& p, const RowTerms& rows, int64_t key,
                                            float* x, float* cap_slopes, int64_t line, int64_t count) {
  float factor = p.scale * kLog2e;
  if (p.soft_cap > 0) {
    const float cap = p.soft_cap * kLog2e, inner = p.scale / p.soft_cap, inverse = 1 / cap;
    for (int64_t j = 0; j < kKeys * line; j += line) {
      cap_each<kFine>(x + j, count, inner, cap, [&](int64_t i, int64_t n, Vec capped) {
        const Vec t = capped * inverse;
        store_some(x + j + i, capped, n);
        store_some(cap_slopes + j + i, 1.0f - t * t, n);
      });
    }
    factor = 1;
  }
  if (p.slopes) {
    for (int64_t i = 0; i < count; i += kLanes) {
      const Vec slope = load(rows.slope + i);
      Vec distance = load(rows.place + i) - static_cast<float>(key);
      for (int64_t j = i; j < kKeys * line; j += line, distance -= 1.0f)
        store(x + j, load(x + j) * factor - slope * abs(distance));
    }
    factor = 1;
  }
  return factor;
}

}  // namespace
}  // namespace GPTCORE_ISA_NS
}  // namespace gptcore
