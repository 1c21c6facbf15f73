// The forward pass of norms over rows: layer normalisation where `centred`, else root mean square normalisation.
//
//   h = x + residual, rounded      mean = sum h / C (0 unless centred)      rstd = 1 / sqrt(sum (h - mean)^2 / C + eps)
//   y = (h - mean) rstd (weight + offset) + bias
//
// A row is read once and stays in registers for the second sum and the result. Rows too wide for the registers of a
// block are shared by a cluster; before sm_90, and beyond a cluster's, they are read again.
#pragma once

#include "core/cuda/norm_plan.h"
#include "core/cuda/row_packs.cuh"
#include "core/cuda/row_sums.cuh"

namespace gptcore::cuda {

struct NormForward {
  const void *x, *residual, *weight, *bias;  // residual, weight, bias may be null
  void *y, *h;                               // h may be null
  float *mean, *rstd;                        // may be null
  int64_t rows, width, x_stride, residual_stride, y_stride, h_stride;
  float eps, offset;
  int cluster;
  bool bf16_weight, packed;
};

// Sums of (v - mean) or of its squares over the elements that exist.
template <bool squared, int kCount>
__device__ __forceinline__ float deviation_sum(const float (&v)[kCount], float mean, int left) {
  float sums[2] = {};
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    const float d = i < left ? v[i] - mean : 0.0f;
    sums[i & 1] += squared ? d * d : d;
  }
  return sums[0] + sums[1];
}

// h from column c on, stored where it is wanted; what is returned holds it as rounded.
template <class T>
__device__ __forceinline__ uint4 added(const NormForward& a, int64_t row, int64_t c, int left, const uint4& x,
                                       const uint4& residual) {
  float v[kPackElements<T>], r[kPackElements<T>];
  unpack(x, v), unpack(residual, r);
#pragma unroll
  for (int i = 0; i < kPackElements<T>; ++i) v[i] += r[i];
  if (a.h) store_some(static_cast<T*>(a.h) + row * a.h_stride + c, v, left, a.packed);
  return pack(v);
}

template <class T>
__device__ __forceinline__ void store_normed(const NormForward& a, int64_t row, int64_t c, int left,
                                             const uint4& raw, float mean, float rstd) {
  constexpr int kCount = kPackElements<T>;
  float v[kCount], w[kCount], b[kCount];
  load_vector(a.weight, a.bf16_weight, c, left, a.packed, 1.0f, w);
  load_vector(a.bias, a.bf16_weight, c, left, a.packed, -0.0f, b);
  unpack(raw, v);
#pragma unroll
  for (int i = 0; i < kCount; ++i) v[i] = (v[i] - mean) * rstd * (w[i] + a.offset) + b[i];
  store_some(static_cast<T*>(a.y) + row * a.y_stride + c, v, left, a.packed);
}

template <class T, bool centred, int kPacks>
__global__ void __launch_bounds__(kNormThreads, 2) norm_forward_rows(const NormForward a) {
  constexpr int kCount = kPackElements<T>;
  float* room = shared_memory<float>();
  const int64_t row = int64_t{blockIdx.x / static_cast<unsigned>(a.cluster)} * blockDim.y + threadIdx.y;
  const auto rank = static_cast<unsigned>(blockIdx.x % static_cast<unsigned>(a.cluster));
  const int64_t first = int64_t{rank * blockDim.x + threadIdx.x} * kCount;
  const int64_t step = int64_t{blockDim.x} * a.cluster * kCount;
  const int left = row < a.rows ? a.width - first : 0;  // none of a row that does not exist
  uint4 raw[kPacks];
  load_packs<T>(static_cast<const T*>(a.x) + row * a.x_stride + first, left, step, a.packed, raw);
  if (a.residual) {
    uint4 residual[kPacks];
    load_packs<T>(static_cast<const T*>(a.residual) + row * a.residual_stride + first, left, step, a.packed,
                  residual);
#pragma unroll
    for (int k = 0; k < kPacks; ++k)
      raw[k] = added<T>(a, row, first + k * step, left - k * step, raw[k], residual[k]);
  }
  const auto sum_of = [&](auto squared, float mean, float* place) {
    float sum[1] = {0.0f};
#pragma unroll
    for (int k = 0; k < kPacks; ++k) {
      float v[kCount];
      unpack(raw[k], v);
      sum[0] += deviation_sum<decltype(squared)::value>(v, mean, left - k * step);
      if constexpr (kCount > 4) forget_elements(raw[k]);
    }
    row_sums(sum, a.cluster, place);
    return sum[0] / static_cast<float>(a.width);
  };
  float mean = 0.0f;
  if constexpr (centred) mean = sum_of(std::false_type{}, 0.0f, room);
  const float rstd = 1.0f / sqrtf(sum_of(std::true_type{}, mean, room + kRowSumRoom<1>) + a.eps);
  if (first == 0 && left > 0) {
    if (a.mean) a.mean[row] = mean;
    if (a.rstd) a.rstd[row] = rstd;
  }
#pragma unroll
  for (int k = 0; k < kPacks; ++k)
    store_normed<T>(a, row, first + k * step, left - k * step, raw[k], mean, rstd);
  if (a.cluster > 1) cluster_sync();  // the others may still read this block's sums
}

// A block a row of any width.
template <class T, bool centred>
__global__ void __launch_bounds__(kNormThreads, 2) norm_forward_wide(const NormForward a) {
  constexpr int kCount = kPackElements<T>;
  constexpr int64_t kStep = kNormThreads * kCount;
  float* room = shared_memory<float>();
  const int64_t row = blockIdx.x, first = int64_t{threadIdx.x} * kCount;
  const T* h = static_cast<const T*>(a.x) + row * a.x_stride;
  if (a.residual) {
    const T* residual = static_cast<const T*>(a.residual) + row * a.residual_stride;
    for (int64_t c = first; c < a.width; c += kStep) {
      added<T>(a, row, c, left_of<T>(a.width, c), load_raw(h + c, left_of<T>(a.width, c), a.packed),
               load_raw(residual + c, left_of<T>(a.width, c), a.packed));
    }
    h = static_cast<const T*>(a.h) + row * a.h_stride;
  }
  const auto sum_of = [&](auto squared, float mean, float* place) {
    float sum[1] = {0.0f};
    for (int64_t c = first; c < a.width; c += kStep) {
      float v[kCount];
      unpack(load_raw(h + c, left_of<T>(a.width, c), a.packed), v);
      sum[0] += deviation_sum<decltype(squared)::value>(v, mean, left_of<T>(a.width, c));
    }
    row_sums(sum, 1, place);
    return sum[0] / static_cast<float>(a.width);
  };
  float mean = 0.0f;
  if constexpr (centred) mean = sum_of(std::false_type{}, 0.0f, room);
  const float rstd = 1.0f / sqrtf(sum_of(std::true_type{}, mean, room + kRowSumRoom<1>) + a.eps);
  if (threadIdx.x == 0) {
    if (a.mean) a.mean[row] = mean;
    if (a.rstd) a.rstd[row] = rstd;
  }
  for (int64_t c = first; c < a.width; c += kStep)
    store_normed<T>(a, row, c, left_of<T>(a.width, c), load_raw(h + c, left_of<T>(a.width, c), a.packed),
                    mean, rstd);
}

template <class T, bool centred>
void norm_forward(NormForward a) {
  a.packed = rows_are_packed<T>(a.width, a.x, a.x_stride, a.y, a.y_stride) &&
             (!a.residual || rows_are_packed<T>(a.width, a.residual, a.residual_stride, a.h, a.h_stride)) &&
             can_pack<float>(a.weight, 0) && can_pack<float>(a.bias, 0);
  if (a.offset == 0.0f) a.offset = -0.0f;  // which leaves -0 as it is
  const NormPlan p = norm_forward_plan(a.rows, divided_up(a.width, kPackElements<T>), limits().arch);
  a.cluster = p.cluster;
  const Launch l{dim3(static_cast<unsigned>(p.blocks)),
                 dim3(static_cast<unsigned>(p.lanes), static_cast<unsigned>(p.groups)),
                 2 * kRowSumRoom<1> * sizeof(float), p.cluster};
  switch (p.packs) {
    case 0:
      return launch<&norm_forward_wide<T, centred>>(l, a);
    case 1:
      return launch<&norm_forward_rows<T, centred, 1>>(l, a);
    case 2:
      return launch<&norm_forward_rows<T, centred, 2>>(l, a);
    default:
      return launch<&norm_forward_rows<T, centred, 4>>(l, a);
  }
}

}  // namespace gptcore::cuda
