#include "core/arena.h"
#include "core/parallel.h"
#include "core/row_blocks.h"
#include "core/simd.h"
#include "core/stream.h"
#include "kernels/gated_activation/gated_activation.h"
#include "kernels/gated_activation/gated_activation_body.h"
#if defined(__AVX512F__)
#include "kernels/gated_activation/gelu_tables.h"
#endif

namespace gptcore {
namespace GPTCORE_ISA_NS {
namespace {

// Elements of one task: 64 KiB of f32, small beside L2, large beside the cost of handing out a task.
constexpr int64_t kTaskElements = 16384;

// --- activations: value, and slope where backward needs it -------------------------------------------------
// Slopes hold x within a range beyond which they are constant, so that inf and overflow give the limit and
// not inf * 0. Values of -inf are NaN, as in torch.

constexpr float kLog2e = 1.44269504088896341f;

// 1 / (1 + t) with t = 2^u, u = -v log2(e): the logistic function of v. Its complement is t times it, so that
// neither cancels, and no |v| is needed. From u = 125 on, where t nears overflow, it is 0.
GPTCORE_INLINE Vec logistic(Vec u, Vec* t) {
  *t = exp2(u);
  return u >= splat(125.0f) ? splat(0.0f) : reciprocal(*t + 1.0f);
}
GPTCORE_INLINE Vec logistic(Vec u) {
  Vec t;
  return logistic(u, &t);
}

#if defined(__AVX512F__)
// x above 0, -0 for x below it, but -inf gives NaN, as gelu does. One instruction that picks by kind: its nibbles, from
// the lowest on, are for NaN, signalling NaN, 0, 1, -inf, inf, negative, positive; 1 keeps x, 2 quiets it, 3 is NaN and
// 7 is -0.
GPTCORE_INLINE Vec positive_part(Vec x) {
  return (Vec)_mm512_fixupimm_ps((__m512)x, (__m512)x, _mm512_set1_epi32(0x17131121), 0);
}
// Where x is not negative 1 - p, else p.
GPTCORE_INLINE Vec subtract_from_one_unless_negative(Vec x, Vec p) {
  const __mmask16 negative = _mm512_movepi32_mask((__m512i)x);  // GCC compares, on the port of the lookups
  return (Vec)_mm512_mask_sub_ps((__m512)p, static_cast<__mmask16>(~negative), _mm512_set1_ps(1.0f),
                                 (__m512)p);
}

// Tables: fewer instructions than an exponential with its division, and exact to the same digits.
template <const float (&kTail)[5][32], const float (&kSlope)[5][32]>
struct Gelu {
  // The function of `table` at -|x|, and 1 less that for x >= 0.
  GPTCORE_INLINE Vec from_tail(const float (&table)[5][32], Vec x) {
    const Vec z = at_most(abs(x), 6.2f);
    const Vec magic = splat(12582912.0f);  // leaves the interval in the low bits, which lookup32 reads
    const Vec w = z * 5.0f + magic, d = z * 5.0f - (w - magic);
    const VecI interval = (VecI)w;
    Vec p = lookup32(table[4], interval);
    p = p * d + lookup32(table[3], interval);
    p = p * d + lookup32(table[2], interval);
    p = p * d + lookup32(table[1], interval);
    p = p * d + lookup32(table[0], interval);
    return x < splat(0.0f) ? p : 1.0f - p;
  }
  GPTCORE_INLINE Vec value(Vec x) { return x * from_tail(kTail, x); }
  GPTCORE_INLINE Vec slope(Vec x, Vec* value_out) {
    *value_out = value(x);
    return from_tail(kSlope, x);
  }
};

// The same for results in bf16, whose half unit is 2^-9 of a result: polynomials of degree 3 in |x| itself, for
// the value times x, which save the distance from the interval's middle, a lookup, and the product with x. Their error
// is 2^-15 of the value down to x = -3 (2^-11 at -4, 2^-9 at -5, where torch's is 2^-3) and 2^-18 of the slope's range.
template <const float (&kValue)[4][32], const float (&kSlope)[4][32]>
struct ShortGelu {
  GPTCORE_INLINE Vec from_table(const float (&table)[4][32], Vec x) {
    const Vec z = at_most(abs(x), 6.2f);
    const VecI interval = (VecI)(z * 5.0f + 12582912.0f);
    Vec p = lookup32(table[3], interval);
    p = p * z + lookup32(table[2], interval);
    p = p * z + lookup32(table[1], interval);
    return p * z + lookup32(table[0], interval);
  }
  GPTCORE_INLINE Vec value(Vec x) { return positive_part(x) + from_table(kValue, x); }
  GPTCORE_INLINE Vec slope(Vec x, Vec* value_out) {
    *value_out = value(x);
    return subtract_from_one_unless_negative(x, from_table(kSlope, x));
  }
};
using GeluTanh = Gelu<kTanhTail, kTanhSlope>;
using GeluErf = Gelu<kErfTail, kErfSlope>;
using ShortGeluTanh = ShortGelu<kShortTanhValue, kShortTanhSlope>;
using ShortGeluErf = ShortGelu<kShortErfValue, kShortErfSlope>;
#else
struct GeluTanh {
  static constexpr float kA = 1.5957691216057308f;      // 2 sqrt(2/pi)
  static constexpr float kB = 0.07135481282553147776f;  // that times 0.044715
  GPTCORE_INLINE Vec exponent(Vec x, Vec square) { return x * (square * (-kLog2e * kB) - kLog2e * kA); }
  GPTCORE_INLINE Vec value(Vec x) { return x * logistic(exponent(x, x * x)); }
  GPTCORE_INLINE Vec slope(Vec x, Vec* value) {
    const Vec c = clamp(x, 10.0f), c2 = c * c;
    Vec t;
    const Vec s = logistic(exponent(c, c2), &t);
    *value = x * s;
    return s + s * (c * (c2 * (3.0f * kB) + kA) * (t * s));
  }
};

struct GeluErf {
  static constexpr float kDensity = 0.39894228040143268f;  // 1 / sqrt(2 pi)

  // Phi(c) from bell = exp(-c^2 / 2), which the slope needs anyway: Phi(-z) = bell t p(t), t = 1 / (1 + 0.34
  // z), p of degree 6 fitted to Mills' ratio for z up to 14.5 by least squares on Chebyshev nodes, reweighted
  // until the error levels: 8e-9 of Phi, 2.7 * 2^-24 with the roundings; the left tail keeps a relative error
  // below 1e-4.
  GPTCORE_INLINE Vec normal(Vec c, Vec bell) {
    const Vec t = reciprocal(abs(c) * 0.34f + 1.0f);
    Vec p = splat(0.0432671381f);
    p = p * t - 0.193475505f;
    p = p * t + 0.251092657f;
    p = p * t - 0.0183175898f;
    p = p * t + 0.150130454f;
    p = p * t + 0.131457535f;
    p = p * t + 0.135845319f;
    const Vec tail = p * t * bell;
    return c < splat(0.0f) ? tail : 1.0f - tail;
  }
  GPTCORE_INLINE Vec value(Vec x) {
    const Vec c = clamp(x, 15.0f);
    return x * normal(c, exp(c * c * -0.5f));
  }
  GPTCORE_INLINE Vec slope(Vec x, Vec* value) {
    const Vec c = clamp(x, 15.0f), bell = exp(c * c * -0.5f), p = normal(c, bell);
    *value = x * p;
    return c * kDensity * bell + p;
  }
};
using ShortGeluTanh = GeluTanh;
using ShortGeluErf = GeluErf;
#endif

// What results of type T are precise enough with.
template <class T>
struct GeluOf {
  using Tanh = GeluTanh;
  using Erf = GeluErf;
};
template <>
struct GeluOf<bf16> {
  using Tanh = ShortGeluTanh;
  using Erf = ShortGeluErf;
};

struct Silu {
  GPTCORE_INLINE Vec value(Vec x) { return x * logistic(x * -kLog2e); }
  GPTCORE_INLINE Vec slope(Vec x, Vec* value) {
    const Vec c = clamp(x, 87.0f);
    Vec t;
    const Vec s = logistic(c * -kLog2e, &t);
    *value = x * s;
    return s + s * (c * (t * s));
  }
};

struct Relu {
  GPTCORE_INLINE Vec value(Vec x) { return x < splat(0.0f) ? splat(0.0f) : x; }
  GPTCORE_INLINE Vec slope(Vec x, Vec* value_out) {
    *value_out = value(x);
    return x <= splat(0.0f) ? splat(0.0f) : splat(1.0f);
  }
};

// --- forward -----------------------------------------------------------------------------------------------

// Runs body(row begin, row end, column begin, column end) over tiles of about kTaskElements.
template <class F>
GPTCORE_INLINE void for_tiles(int64_t rows, int64_t width, const F& body) {
  const int64_t columns = width < kTaskElements ? width : kTaskElements;
  const int64_t height = kTaskElements / columns;
  const int64_t across = (width + columns - 1) / columns, down = (rows + height - 1) / height;
  const auto tile = [&](int64_t task) {
    const int64_t row = task / across * height, column = task % across * columns;
    body(row, row + height < rows ? row + height : rows, column,
         column + columns < width ? column + columns : width);
  };
  if (across * down <= 2) {
    for (int64_t task = 0; task < across * down; ++task) tile(task);
  } else {
    parallel_for(across * down, [&](int64_t task, int) { tile(task); });
  }
}

// One vector's result. u is not read in the plain form.
template <class Act, bool gated>
GPTCORE_INLINE Vec value_of(Vec x, Vec u) {
  const Vec value = Act::value(x);
  return gated ? value * u : value;
}

// The vectors of an input that has a bias, or none.
template <class T>
GPTCORE_INLINE Pair biased_pair(const T* p, const float* bias, int64_t c) {
  const Pair x = load_pair(p + c);
  return bias ? plus(x, load_pair(bias + c)) : x;
}
template <class T>
GPTCORE_INLINE Vec biased(const T* p, const float* bias, int64_t c, int64_t n) {
  const Vec x = load_some(p + c, n);
  return bias ? x + load_some(bias + c, n) : x;
}

template <class T, class Act, bool gated>
[[gnu::noinline]] void forward_row(const T* gate, const T* up, const float* gate_bias, const float* up_bias,
                                   T* y, int64_t width, bool streams) {
  for_pairs(
      width,
      [&](int64_t c, int) {
        fetch_pair_ahead(gate + c);
        const Pair x = biased_pair(gate, gate_bias, c);
        Pair u = x;
        if constexpr (gated) fetch_pair_ahead(up + c), u = biased_pair(up, up_bias, c);
        write_pair(y + c, {value_of<Act, gated>(x.low, u.low), value_of<Act, gated>(x.high, u.high)},
                   streams);
      },
      [&](int64_t c, int64_t n) {
        const Vec x = biased(gate, gate_bias, c, n);
        store_some(y + c, value_of<Act, gated>(x, gated ? biased(up, up_bias, c, n) : x), n);
      });
}

GPTCORE_INLINE const float* behind(const float* p, int64_t offset) { return p ? p + offset : nullptr; }

template <class T, class Act, bool gated>
void forward_tiles(const GatedActivationForward& a, const float* gate_bias, const float* up_bias) {
  const int64_t element = sizeof(T);
  const bool streams = a.y != a.gate && can_stream(a.y, a.y_stride * element, a.rows * a.width * element);
  for_tiles(a.rows, a.width, [&](int64_t row, int64_t row_end, int64_t begin, int64_t end) {
    for (; row < row_end; ++row) {
      const T* gate = static_cast<const T*>(a.gate) + row * a.gate_stride + begin;
      const T* up = gated ? static_cast<const T*>(a.up) + row * a.up_stride + begin : nullptr;
      forward_row<T, Act, gated>(gate, up, behind(gate_bias, begin), behind(up_bias, begin),
                                 static_cast<T*>(a.y) + row * a.y_stride + begin, end - begin, streams);
    }
    if (streams) stream_fence();
  });
}

template <class T, class Act>
void forward_as(const GatedActivationForward& a) {
  const Scratch scratch(a.bf16_bias ? static_cast<size_t>(2 * a.width) * sizeof(float) : 0);
  const float* gate_bias = as_f32(a.gate_bias, a.bf16_bias, a.width, scratch.as<float>());
  const float* up_bias = as_f32(a.up_bias, a.bf16_bias, a.width, scratch.as<float>() + a.width);
  a.up ? forward_tiles<T, Act, true>(a, gate_bias, up_bias)
       : forward_tiles<T, Act, false>(a, gate_bias, up_bias);
}

template <class T>
void forward(const GatedActivationForward& a) {
  switch (a.activation) {
    case kGeluTanh:
      return forward_as<T, typename GeluOf<T>::Tanh>(a);
    case kGeluErf:
      return forward_as<T, typename GeluOf<T>::Erf>(a);
    case kSilu:
      return forward_as<T, Silu>(a);
    default:
      return forward_as<T, Relu>(a);
  }
}

// --- backward ----------------------------------------------------------------------------------------------

// Biases and partial sums of a tile, from its first column on; null where absent.
struct Columns {
  const float *gate_bias, *up_bias;
  float *dgate_bias, *dup_bias;
};

GPTCORE_INLINE void add_to(float* sum, Vec x, int64_t n) {
  if (sum) store_some(sum, load_some(sum, n) + x, n);
}

// One vector's gradients: dup, only in the gated form, and dgate.
template <class Act, bool gated>
GPTCORE_INLINE Vec gradients_of(Vec g, Vec x, Vec u, Vec* dup) {
  Vec value;
  const Vec slope = Act::slope(x, &value);
  if constexpr (gated) *dup = g * value, g *= u;
  return g * slope;
}

template <class T, class Act, bool gated>
[[gnu::noinline]] void backward_row(const GatedActivationBackward& a, int64_t row, int64_t begin, int64_t end,
                                    const Columns& columns, bool streams) {
  const T* dy = static_cast<const T*>(a.grad_y) + row * a.grad_y_stride + begin;
  const T* gate = static_cast<const T*>(a.gate) + row * a.gate_stride + begin;
  const T* up = gated ? static_cast<const T*>(a.up) + row * a.up_stride + begin : nullptr;
  T* dgate = static_cast<T*>(a.dgate) + row * a.dgate_stride + begin;
  T* dup = gated ? static_cast<T*>(a.dup) + row * a.dup_stride + begin : nullptr;
  const Columns at = columns;  // a copy: stores of vectors might alias it
  for_pairs(
      end - begin,
      [&](int64_t c, int) {
        fetch_pair_ahead(gate + c), fetch_pair_ahead(dy + c);
        const Pair x = biased_pair(gate, at.gate_bias, c), g = load_pair(dy + c);
        Pair u = x, du, dx;
        if constexpr (gated) fetch_pair_ahead(up + c), u = biased_pair(up, at.up_bias, c);
        dx.low = gradients_of<Act, gated>(g.low, x.low, u.low, &du.low);
        dx.high = gradients_of<Act, gated>(g.high, x.high, u.high, &du.high);
        write_pair(dgate + c, dx, streams);
        if (at.dgate_bias) store_pair(at.dgate_bias + c, plus(load_pair(at.dgate_bias + c), dx));
        if constexpr (gated) {
          write_pair(dup + c, du, streams);
          if (at.dup_bias) store_pair(at.dup_bias + c, plus(load_pair(at.dup_bias + c), du));
        }
      },
      [&](int64_t c, int64_t n) {
        const Vec x = biased(gate, at.gate_bias, c, n);
        Vec du;
        const Vec dx =
            gradients_of<Act, gated>(load_some(dy + c, n), x, gated ? biased(up, at.up_bias, c, n) : x, &du);
        store_some(dgate + c, dx, n);
        add_to(at.dgate_bias ? at.dgate_bias + c : nullptr, dx, n);
        if constexpr (gated) {
          store_some(dup + c, du, n);
          add_to(at.dup_bias ? at.dup_bias + c : nullptr, du, n);
        }
      });
}

template <class T>
bool streams_gradients(const GatedActivationBackward& a) {
  const int64_t element = sizeof(T), bytes = a.rows * a.width * element;
  return a.dgate != a.gate && a.dgate != a.grad_y &&  // in place each line is there already
         can_stream(a.dgate, a.dgate_stride * element, bytes) &&
         (!a.dup || can_stream(a.dup, a.dup_stride * element, bytes));
}

template <class T, class Act, bool gated>
void backward_with_sums(const GatedActivationBackward& a, Columns biases) {
  const int64_t block_rows = block_rows_of(a.rows), blocks = (a.rows + block_rows - 1) / block_rows;
  const int64_t width = a.width;
  const bool streams = streams_gradients<T>(a);
  const Scratch scratch(static_cast<size_t>(blocks * 2 * width) * sizeof(float));
  float* partials = scratch.as<float>();
  const auto block_body = [&](int64_t block) {
    float* sums = partials + block * 2 * width;
    __builtin_memset(sums, 0, static_cast<size_t>(2 * width) * sizeof(float));
    const Columns columns{biases.gate_bias, biases.up_bias, sums, gated ? sums + width : nullptr};
    const int64_t end = (block + 1) * block_rows < a.rows ? (block + 1) * block_rows : a.rows;
    for (int64_t row = block * block_rows; row < end; ++row) {
      backward_row<T, Act, gated>(a, row, 0, width, columns, streams);
    }
    if (streams) stream_fence();
  };
  if (a.rows * width <= 2 * kTaskElements) {
    for (int64_t block = 0; block < blocks; ++block) block_body(block);
  } else {
    parallel_for(blocks, [&](int64_t block, int) { block_body(block); });
  }
  join_blocks(partials, 2 * width, blocks, width, a.dgate_bias, a.bf16_dbias);
  join_blocks(partials + width, 2 * width, blocks, width, a.dup_bias, a.bf16_dbias);
}

template <class T, class Act, bool gated>
void backward_as(const GatedActivationBackward& a) {
  const Scratch scratch(a.bf16_bias ? static_cast<size_t>(2 * a.width) * sizeof(float) : 0);
  const Columns biases{as_f32(a.gate_bias, a.bf16_bias, a.width, scratch.as<float>()),
                       as_f32(a.up_bias, a.bf16_bias, a.width, scratch.as<float>() + a.width), nullptr,
                       nullptr};
  if (a.dgate_bias || a.dup_bias) return backward_with_sums<T, Act, gated>(a, biases);
  const bool streams = streams_gradients<T>(a);
  for_tiles(a.rows, a.width, [&](int64_t row, int64_t row_end, int64_t begin, int64_t end) {
    const Columns columns{behind(biases.gate_bias, begin), behind(biases.up_bias, begin), nullptr, nullptr};
    for (; row < row_end; ++row) backward_row<T, Act, gated>(a, row, begin, end, columns, streams);
    if (streams) stream_fence();
  });
}

template <class T, class Act>
void backward_for(const GatedActivationBackward& a) {
  a.up ? backward_as<T, Act, true>(a) : backward_as<T, Act, false>(a);
}

template <class T>
void backward(const GatedActivationBackward& a) {
  switch (a.activation) {
    case kGeluTanh:
      return backward_for<T, typename GeluOf<T>::Tanh>(a);
    case kGeluErf:
      return backward_for<T, typename GeluOf<T>::Erf>(a);
    case kSilu:
      return backward_for<T, Silu>(a);
    default:
      return backward_for<T, Relu>(a);
  }
}

}  // namespace

extern const GatedActivationBodies gated_activation_bodies;
const GatedActivationBodies gated_activation_bodies = {
    {forward<float>, forward<bf16>},
    {backward<float>, backward<bf16>},
};

}  // namespace GPTCORE_ISA_NS
}  // namespace gptcore
