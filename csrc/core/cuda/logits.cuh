// The logits of a row, from what the products left: where they lie, and bias, scale and cap on the way.
#pragma once

#include "core/cuda/launch.cuh"
#include "core/cuda/pack.cuh"
#include "core/loss_rows.h"

namespace gptcore::cuda {
namespace {

__device__ __forceinline__ float at(const ClassVector& v, int64_t i) {
  return v.bf16 ? to_float(static_cast<const bf16*>(v.data)[i]) : static_cast<const float*>(v.data)[i];
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

}  // namespace
}  // namespace gptcore::cuda
