#include "core/arena.h"
#include "core/parallel.h"
#include "core/row_blocks.h"
#include "core/simd.h"
#include "core/stream.h"
#include "kernels/rotary/rotary_body.h"

namespace gptcore {
namespace GPTCORE_ISA_NS {
namespace {

GPTCORE_INLINE Vec swap_pairs(Vec x) {
#if defined(__AVX512F__)
  return (Vec)_mm512_permute_ps((__m512)x, 0xb1);
#else
  Vec y;
  for (int i = 0; i < kLanes; ++i) y[i] = x[i ^ 1];
  return y;
#endif
}

// One token's angles laid out for the interleaved form: each cosine twice, each sine as (-sin, sin), so that
// x' = x c + swap(x) s.
GPTCORE_INLINE void spread_angles(const float* cos, const float* sin, float sign, int64_t half, float* c,
                                  float* s) {
  for (int64_t i = 0; i < half; ++i) {
    c[2 * i] = c[2 * i + 1] = cos[i];
    s[2 * i] = -sign * sin[i];
    s[2 * i + 1] = sign * sin[i];
  }
}

GPTCORE_INLINE Vec rotated_pairs(Vec x, Vec c, Vec s) { return x * c + swap_pairs(x) * s; }

template <class T>
GPTCORE_INLINE void rotate_pairs(const T* x, T* out, const float* c, const float* s, int64_t width,
                                 bool streams) {
  for_pairs(
      width,
      [&](int64_t i, int) {
        fetch_pair_ahead(x + i);
        const Pair v = load_pair(x + i), cos = load_pair(c + i), sin = load_pair(s + i);
        write_pair(out + i,
                   {rotated_pairs(v.low, cos.low, sin.low), rotated_pairs(v.high, cos.high, sin.high)},
                   streams);
      },
      [&](int64_t i, int64_t n) {
        store_some(out + i, rotated_pairs(load_some(x + i, n), load_some(c + i, n), load_some(s + i, n)), n);
      });
}

template <class T>
GPTCORE_INLINE void rotate_halves(const T* x, T* out, const float* cos, const float* sin, float sign,
                                  int64_t half, bool streams) {
  for_pairs(
      half,
      [&](int64_t i, int) {
        const Pair c = load_pair(cos + i), t = load_pair(sin + i), s = {t.low * sign, t.high * sign};
        fetch_pair_ahead(x + i), fetch_pair_ahead(x + half + i);
        const Pair a = load_pair(x + i), b = load_pair(x + half + i);
        write_pair(out + i, {a.low * c.low - b.low * s.low, a.high * c.high - b.high * s.high}, streams);
        write_pair(out + half + i, {b.low * c.low + a.low * s.low, b.high * c.high + a.high * s.high},
                   streams);
      },
      [&](int64_t i, int64_t n) {
        const Vec c = load_some(cos + i, n), s = load_some(sin + i, n) * sign;
        const Vec a = load_some(x + i, n), b = load_some(x + half + i, n);
        store_some(out + i, a * c - b * s, n);
        store_some(out + half + i, b * c + a * s, n);
      });
}

template <class T>
void rotate_token(const Rotary& a, int64_t batch, int64_t token, float* room, bool streams) {
  const int64_t position =
      a.positions ? a.positions[batch * a.position_batch_stride + token] : a.offset + token;
  const float *cos = a.cos + position * a.half, *sin = a.sin + position * a.half;
  const float sign = a.inverse ? -1.0f : 1.0f;
  const int64_t width = 2 * a.half;
  float *c = room, *s = room + width;
  if (a.interleaved) spread_angles(cos, sin, sign, a.half, c, s);
  const T* x = static_cast<const T*>(a.x) + batch * a.x_strides.batch + token * a.x_strides.token;
  T* out = static_cast<T*>(a.out) + batch * a.out_strides.batch + token * a.out_strides.token;
  for (int64_t head = 0; head < a.heads; ++head, x += a.x_strides.head, out += a.out_strides.head) {
    a.interleaved ? rotate_pairs(x, out, c, s, width, streams)
                  : rotate_halves(x, out, cos, sin, sign, a.half, streams);
    if (x != out && width < a.head_size) {
      __builtin_memcpy(out + width, x + width, static_cast<size_t>(a.head_size - width) * sizeof(T));
    }
  }
}

// Whether all that is written, a half at a time, starts on a line; in place each line is there already.
template <class T>
bool streams_result(const Rotary& a) {
  const int64_t element = sizeof(T), numel = a.batch * a.tokens * a.heads * a.head_size;
  const RotaryStrides& strides = a.out_strides;
  return a.x != a.out && can_stream(a.out, (strides.batch | strides.token | strides.head | a.half) * element,
                                    numel * element);
}

template <class T>
void run(const Rotary& a) {
  const bool streams = streams_result<T>(a);
  const int64_t grain = kGrainElements / (a.heads * a.head_size) + 1;
  parallel_ranges(a.batch * a.tokens, grain, [&](int64_t begin, int64_t end) {
    const Scratch scratch(a.interleaved ? static_cast<size_t>(4 * a.half) * sizeof(float) : 0);
    for (int64_t i = begin; i < end; ++i) {
      rotate_token<T>(a, i / a.tokens, i % a.tokens, scratch.as<float>(), streams);
    }
    if (streams) stream_fence();
  });
}

}  // namespace

extern const RotaryBodies rotary_bodies;
const RotaryBodies rotary_bodies = {{run<float>, run<bf16>}};

}  // namespace GPTCORE_ISA_NS
}  // namespace gptcore
