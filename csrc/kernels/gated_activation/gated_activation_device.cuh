// Activations of one element on CUDA: value, and slope where backward needs it, within a few roundings of f32.
//
// Slopes hold x within a range beyond which they are constant, so that inf and overflow give the limit and not inf * 0.
// Values of -inf are NaN, as in torch.
#pragma once

#include "core/cuda/approximate.cuh"
#include "core/dtype.h"

namespace gptcore::cuda {

__device__ __forceinline__ float within(float x, float limit) {
  return x != x ? x : fminf(fmaxf(x, -limit), limit);  // minima and maxima would drop a NaN
}

// Exponential and reciprocal: to a rounding or two where results are f32, by the special-function unit alone where bf16
// drops sixteen bits of them anyway and half the bytes leave half the time.
template <class T>
struct Precise {
  __device__ static float exp(float x) { return expf(x); }
  __device__ static float reciprocal(float x) { return __frcp_rn(x); }
};
template <>
struct Precise<bf16> {
  __device__ static float exp(float x) { return exp2_approximate(x * 1.44269504088896341f); }
  __device__ static float reciprocal(float x) { return reciprocal_approximate(x); }
};

// 1 / (1 + t) for t = exp(-v), the logistic function of v: its complement is t times it, so that neither cancels.
template <class T>
__device__ __forceinline__ float logistic(float t) {
  return Precise<T>::reciprocal(1.0f + t);
}

template <class T>
struct GeluTanh {
  static constexpr float kA = 1.5957691216057308f;      // 2 sqrt(2/pi)
  static constexpr float kB = 0.07135481282553147776f;  // that times 0.044715

  __device__ static float value(float x) { return x * logistic<T>(Precise<T>::exp(-x * (x * x * kB + kA))); }
  __device__ static float slope(float x, float* value) {
    const float c = within(x, 10.0f), c2 = c * c, t = Precise<T>::exp(-c * (c2 * kB + kA)),
                s = logistic<T>(t);
    *value = x * s;
    return s + s * (c * (c2 * (3.0f * kB) + kA) * (t * s));
  }
};

template <class T>
struct GeluErf {
  static constexpr float kDensity = 0.39894228040143268f;  // 1 / sqrt(2 pi)

  // Phi(c) from bell = exp(-c^2 / 2), which the slope needs anyway: Phi(-z) = bell t p(t), t = 1 / (1 + 0.34 z), with
  // the processor's p, fitted to Mills' ratio.
  __device__ static float normal(float c, float bell) {
    const float t = Precise<T>::reciprocal(fabsf(c) * 0.34f + 1.0f);
    float p = 0.0432671381f;
    p = p * t - 0.193475505f;
    p = p * t + 0.251092657f;
    p = p * t - 0.0183175898f;
    p = p * t + 0.150130454f;
    p = p * t + 0.131457535f;
    p = p * t + 0.135845319f;
    const float tail = p * t * bell;
    return c < 0.0f ? tail : 1.0f - tail;
  }
  __device__ static float value(float x) {
    const float c = within(x, 15.0f);
    return x * normal(c, Precise<T>::exp(c * c * -0.5f));
  }
  __device__ static float slope(float x, float* value) {
    const float c = within(x, 15.0f), bell = Precise<T>::exp(c * c * -0.5f), p = normal(c, bell);
    *value = x * p;
    return c * kDensity * bell + p;
  }
};

template <class T>
struct Silu {
  __device__ static float value(float x) { return x * logistic<T>(Precise<T>::exp(-x)); }
  __device__ static float slope(float x, float* value) {
    const float c = within(x, 87.0f), t = Precise<T>::exp(-c), s = logistic<T>(t);
    *value = x * s;
    return s + s * (c * (t * s));
  }
};

template <class T>
struct Relu {
  __device__ static float value(float x) { return x < 0.0f ? 0.0f : x; }
  __device__ static float slope(float x, float* value_out) {
    *value_out = value(x);
    return x <= 0.0f ? 0.0f : 1.0f;
  }
};

}  // namespace gptcore::cuda
