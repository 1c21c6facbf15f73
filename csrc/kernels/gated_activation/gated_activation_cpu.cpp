#include "core/arena.h"
#include "core/parallel.h"
#include "core/row_blocks.h"
#include "core/simd.h"
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
using GeluTanh = Gelu<kTanhTail, kTanhSlope>;
using GeluErf = Gelu<kErfTail, kErfSlope>;
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
#endif

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

// Asks for what lies 2 KiB ahead. With some 20 instructions between two loads the core's window holds too few
// of them to cover the latency of memory, and the hardware prefetcher stops at every page.
template <class T>
GPTCORE_INLINE void prefetch(const T* p) {
  __builtin_prefetch(reinterpret_cast<const char*>(p) + 2048);
}

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

template <class T, class Act, bool gated>
void forward_tiles(const GatedActivationForward& a, const float* gate_bias, const float* up_bias) {
  for_tiles(a.rows, a.width, [&](int64_t row, int64_t row_end, int64_t begin, int64_t end) {
    for (; row < row_end; ++row) {
      const T* gate = static_cast<const T*>(a.gate) + row * a.gate_stride;
      const T* up = gated ? static_cast<const T*>(a.up) + row * a.up_stride : nullptr;
      T* y = static_cast<T*>(a.y) + row * a.y_stride;
      for_lanes(end - begin, [&](int64_t offset, int64_t n) {
        const int64_t c = begin + offset;
        prefetch(gate + c);
        if constexpr (gated) prefetch(up + c);
        Vec x = load_some(gate + c, n);
        if (gate_bias) x += load_some(gate_bias + c, n);
        Vec value = Act::value(x);
        if constexpr (gated) {
          Vec u = load_some(up + c, n);
          if (up_bias) u += load_some(up_bias + c, n);
          value *= u;
        }
        store_some(y + c, value, n);
      });
    }
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
      return forward_as<T, GeluTanh>(a);
    case kGeluErf:
      return forward_as<T, GeluErf>(a);
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

template <class T, class Act, bool gated>
[[gnu::noinline]] void backward_row(const GatedActivationBackward& a, int64_t row, int64_t begin, int64_t end,
                                    const Columns& columns) {
  const T* dy = static_cast<const T*>(a.grad_y) + row * a.grad_y_stride + begin;
  const T* gate = static_cast<const T*>(a.gate) + row * a.gate_stride + begin;
  const T* up = gated ? static_cast<const T*>(a.up) + row * a.up_stride + begin : nullptr;
  T* dgate = static_cast<T*>(a.dgate) + row * a.dgate_stride + begin;
  T* dup = gated ? static_cast<T*>(a.dup) + row * a.dup_stride + begin : nullptr;
  for_lanes(end - begin, [&](int64_t c, int64_t n) {
    prefetch(gate + c), prefetch(dy + c);
    if constexpr (gated) prefetch(up + c);
    Vec x = load_some(gate + c, n), value;
    if (columns.gate_bias) x += load_some(columns.gate_bias + c, n);
    const Vec slope = Act::slope(x, &value);
    Vec g = load_some(dy + c, n);
    if constexpr (gated) {
      Vec u = load_some(up + c, n);
      if (columns.up_bias) u += load_some(columns.up_bias + c, n);
      const Vec du = g * value;
      store_some(dup + c, du, n);
      add_to(columns.dup_bias ? columns.dup_bias + c : nullptr, du, n);
      g *= u;
    }
    g *= slope;
    store_some(dgate + c, g, n);
    add_to(columns.dgate_bias ? columns.dgate_bias + c : nullptr, g, n);
  });
}

template <class T, class Act, bool gated>
void backward_with_sums(const GatedActivationBackward& a, Columns biases) {
  const int64_t block_rows = block_rows_of(a.rows), blocks = (a.rows + block_rows - 1) / block_rows;
  const int64_t width = a.width;
  const Scratch scratch(static_cast<size_t>(blocks * 2 * width) * sizeof(float));
  float* partials = scratch.as<float>();
  const auto block_body = [&](int64_t block) {
    float* sums = partials + block * 2 * width;
    __builtin_memset(sums, 0, static_cast<size_t>(2 * width) * sizeof(float));
    const Columns columns{biases.gate_bias, biases.up_bias, sums, gated ? sums + width : nullptr};
    const int64_t end = (block + 1) * block_rows < a.rows ? (block + 1) * block_rows : a.rows;
    for (int64_t row = block * block_rows; row < end; ++row) {
      backward_row<T, Act, gated>(a, row, 0, width, columns);
    }
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
  for_tiles(a.rows, a.width, [&](int64_t row, int64_t row_end, int64_t begin, int64_t end) {
    const Columns columns{biases.gate_bias ? biases.gate_bias + begin : nullptr,
                          biases.up_bias ? biases.up_bias + begin : nullptr, nullptr, nullptr};
    for (; row < row_end; ++row) backward_row<T, Act, gated>(a, row, begin, end, columns);
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
      return backward_for<T, GeluTanh>(a);
    case kGeluErf:
      return backward_for<T, GeluErf>(a);
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
