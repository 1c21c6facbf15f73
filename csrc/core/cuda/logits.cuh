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
  // `count` products from class c on become logits.
  template <int n>
  __device__ __forceinline__ void replace(float (&products)[n], int64_t c, int count) const {
    if (plain) return;
#pragma unroll
    for (int i = 0; i < count; ++i) products[i] = (*this)(products[i], c + i);
  }
  // The derivative by the product, at the logit l.
  __device__ float slope(float l) const {
    if (plain) return 1.0f;
    const float share = soft_cap != 0.0f ? l / soft_cap : 0.0f;
    return scale * (1.0f - share * share);
  }
};

// body(c, products, count) over the row: first what lies before and behind its packs, one by one, then the packs, of
// which a thread asks for two before it looks at the first. Rows of odd widths begin anywhere.
template <class T, class Body>
__device__ __forceinline__ void for_row(const T* row, int64_t classes, const Body& body) {
  constexpr int n = kPackElements<T>;
  const auto misaligned = static_cast<int64_t>(reinterpret_cast<uintptr_t>(row) % kPackBytes);
  const int64_t before = misaligned ? (kPackBytes - misaligned) / static_cast<int64_t>(sizeof(T)) : 0;
  const int64_t begin = before < classes ? before : classes, end = begin + (classes - begin) / n * n;
  const int64_t single = threadIdx.x < begin ? threadIdx.x : end + threadIdx.x - begin;
  if (single < classes) {
    float values[n];
    values[0] = to_float(row[single]);
    body(single, values, 1);
  }
  const int64_t step = int64_t{blockDim.x} * n;
  for (int64_t c = begin + int64_t{threadIdx.x} * n; c < end; c += 2 * step) {
    const bool two = c + step < end;
    float values[n], next[n] = {};
    load_pack(row + c, values);
    if (two) load_pack(row + c + step, next);
    body(c, values, n);
    if (two) body(c + step, next, n);
  }
}

}  // namespace
}  // namespace gptcore::cuda
