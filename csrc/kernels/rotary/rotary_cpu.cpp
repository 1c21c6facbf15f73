#include "core/arena.h"
#include "core/parallel.h"
#include "core/simd.h"
#include "kernels/rotary/rotary_body.h"

namespace gptcore {
namespace GPTCORE_ISA_NS {
namespace {

// Elements below which a second thread does not pay.
constexpr int64_t kGrainElements = 16384;

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

template <class T>
GPTCORE_INLINE void rotate_pairs(const T* x, T* out, const float* c, const float* s, int64_t width) {
  for_lanes(width, [&](int64_t i, int64_t n) {
    const Vec v = load_some(x + i, n);
    store_some(out + i, v * load_some(c + i, n) + swap_pairs(v) * load_some(s + i, n), n);
  });
}

template <class T>
GPTCORE_INLINE void rotate_halves(const T* x, T* out, const float* cos, const float* sin, float sign,
                                  int64_t half) {
  for_lanes(half, [&](int64_t i, int64_t n) {
    const Vec c = load_some(cos + i, n), s = load_some(sin + i, n) * sign;
    const Vec a = load_some(x + i, n), b = load_some(x + half + i, n);
    store_some(out + i, a * c - b * s, n);
    store_some(out + half + i, b * c + a * s, n);
  });
}

template <class T>
void rotate_token(const Rotary& a, int64_t batch, int64_t token, float* room) {
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
    a.interleaved ? rotate_pairs(x, out, c, s, width) : rotate_halves(x, out, cos, sin, sign, a.half);
    if (x != out && width < a.head_size) {
      __builtin_memcpy(out + width, x + width, static_cast<size_t>(a.head_size - width) * sizeof(T));
    }
  }
}

template <class T>
void run(const Rotary& a) {
  const int64_t grain = kGrainElements / (a.heads * a.head_size) + 1;
  parallel_ranges(a.batch * a.tokens, grain, [&](int64_t begin, int64_t end) {
    const Scratch scratch(a.interleaved ? static_cast<size_t>(4 * a.half) * sizeof(float) : 0);
    for (int64_t i = begin; i < end; ++i) rotate_token<T>(a, i / a.tokens, i % a.tokens, scratch.as<float>());
  });
}

}  // namespace

extern const RotaryBodies rotary_bodies;
const RotaryBodies rotary_bodies = {{run<float>, run<bf16>}};

}  // namespace GPTCORE_ISA_NS
}  // namespace gptcore
