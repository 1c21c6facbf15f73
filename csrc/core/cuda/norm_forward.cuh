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
#include "core/cuda/row_walk.cuh"

namespace gptcore::cuda {

struct NormForward {
  const void *x, *residual, *weight, *bias;  // residual, weight, bias may be null
  void *y, *h;                               // h may be null
  float *mean, *rstd;                        // may be null
  int64_t rows, width, x_stride, residual_stride, y_stride, h_stride;
  float eps, offset, share;  // share: 1 / width
  int cluster;
  bool bf16_weight, packed;
};

constexpr int kNormRoom = (2 * kRowSumRoom<1> + 3) / 4 * 4;  // floats for sums

// Sums of (v - mean) or of its squares over the elements that exist: all of them in packed rows.
template <bool squared, int kCount>
__device__ __forceinline__ float deviation_sum(const float (&v)[kCount], float mean, int left, bool packed) {
  float sums[2] = {};
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    const float d = packed || i < left ? v[i] - mean : 0.0f;
    sums[i & 1] += squared ? d * d : d;
  }
  return sums[0] + sums[1];
}

// h from column c on, stored where it is wanted; what is returned holds it as rounded.
template <class T>
__device__ __forceinline__ uint4 added(const NormForward& a, int64_t row, int64_t c, int left, bool packed,
                                       const uint4& x, const uint4& residual) {
  float v[kPackElements<T>], r[kPackElements<T>];
  unpack(x, v), unpack(residual, r);
#pragma unroll
  for (int i = 0; i < kPackElements<T>; ++i) v[i] += r[i];
  if (a.h) store_some(static_cast<T*>(a.h) + row * a.h_stride + c, v, left, packed);
  return pack(v);
}

template <class T, int kPacks, bool packed>
__device__ __forceinline__ void add_residual(const NormForward& a, int64_t row, int first, int left, int step,
                                             uint4 (&raw)[kPacks]) {
  const T* p = static_cast<const T*>(a.residual) + row * a.residual_stride + first;
  uint4 residual[kPacks];
  if (packed) load_packs<T>(p, left, step, true, residual);
#pragma unroll
  for (int k = 0; k < kPacks; ++k) {
    if (left <= k * step) continue;
    if (!packed) residual[k] = load_raw(p + k * step, left - k * step, false);
    raw[k] = added<T>(a, row, first + k * step, left - k * step, packed, raw[k], residual[k]);
  }
}

// Weight + offset and bias of a pack's columns.
template <int kCount>
struct NormVectors {
  float w[kCount], b[kCount];

  __device__ __forceinline__ void load(const NormForward& a, int64_t c, int left, bool packed) {
    load_vector(a.weight, a.bf16_weight, c, left, packed, 1.0f, w);
    load_vector(a.bias, a.bf16_weight, c, left, packed, -0.0f, b);
#pragma unroll
    for (int i = 0; i < kCount; ++i) w[i] += a.offset;
  }

  // In shared memory for all rows of the block: 16 bytes of each thread of a row side by side. Pack k of this thread.
  __device__ __forceinline__ void put(float4* room, int k) const {
#pragma unroll
    for (int i = 0; i < kCount; i += 4) {
      *place(room, k, i, 0) = make_float4(w[i], w[i + 1], w[i + 2], w[i + 3]);
      *place(room, k, i, 1) = make_float4(b[i], b[i + 1], b[i + 2], b[i + 3]);
    }
  }
  __device__ __forceinline__ void get(float4* room, int k) {
#pragma unroll
    for (int i = 0; i < kCount; i += 4) {
      const float4 x = *place(room, k, i, 0), y = *place(room, k, i, 1);
      w[i] = x.x, w[i + 1] = x.y, w[i + 2] = x.z, w[i + 3] = x.w;
      b[i] = y.x, b[i + 1] = y.y, b[i + 2] = y.z, b[i + 3] = y.w;
    }
  }
  __device__ __forceinline__ static float4* place(float4* room, int k, int i, int which) {
    return room + ((k * kCount + i) / 2 + which) * blockDim.x + threadIdx.x;
  }
};

template <class T>
__device__ __forceinline__ void store_normed(const NormForward& a,
                                             const NormVectors<kPackElements<T>>& vectors, int64_t row,
                                             int64_t c, int left, bool packed, const uint4& raw, float mean,
                                             float rstd) {
  float v[kPackElements<T>];
  unpack(raw, v);
#pragma unroll
  for (int i = 0; i < kPackElements<T>; ++i) v[i] = (v[i] - mean) * rstd * vectors.w[i] + vectors.b[i];
  store_some(static_cast<T*>(a.y) + row * a.y_stride + c, v, left, packed);
}

// A block stays for many rows, each group of its threads with one at a time, the next on its way: so weight and bias
// are widened once, into shared memory.
template <class T, bool centred, int kPacks, bool packed>
__global__ void __launch_bounds__(norm_forward_threads(kPacks), 1) norm_forward_rows(const NormForward a) {
  constexpr int kCount = kPackElements<T>;
  float* room = shared_memory<float>();
  const RowWalk walk(a.cluster);
  const int first = walk.first<kCount>(), step = walk.step<kCount>(), width = static_cast<int>(a.width);
  uint4 raw[kPacks], next[kPacks] = {};
  const auto fetch = [&](int64_t row) {
    load_packs<T>(static_cast<const T*>(a.x) + row * a.x_stride + first, row < a.rows ? width - first : 0,
                  step, packed, next);
  };
  if (packed) fetch(walk.mine);
  float4* const shared = reinterpret_cast<float4*>(room + kNormRoom);
  for (int k = static_cast<int>(threadIdx.y); k < kPacks; k += static_cast<int>(blockDim.y)) {
    NormVectors<kCount> vectors;
    vectors.load(a, first + k * step, width - first - k * step, packed);
    vectors.put(shared, k);
  }
  __syncthreads();
  int turn = 0;
  for (int64_t row = walk.mine; row + walk.leader < a.rows; row += walk.stride) {
    const int left = row < a.rows ? width - first : 0;  // none of a row that does not exist
    if (!packed) fetch(row);
#pragma unroll
    for (int k = 0; k < kPacks; ++k) raw[k] = next[k];
    if (packed) fetch(row + walk.stride);
    if (a.residual) add_residual<T, kPacks, packed>(a, row, first, left, step, raw);
    const auto sum_of = [&](auto squared, float mean) {
      float sum[1] = {0.0f};
#pragma unroll
      for (int k = 0; k < kPacks; ++k) {
        if (left <= k * step) continue;
        float v[kCount];
        unpack(raw[k], v);
        sum[0] += deviation_sum<decltype(squared)::value>(v, mean, left - k * step, packed);
        if constexpr (kCount > 4) forget_elements(raw[k]);
      }
      row_sums(sum, a.cluster, room + turn * kRowSumRoom<1>);
      turn ^= 1;
      return sum[0] * a.share;
    };
    float mean = 0.0f;
    if constexpr (centred) mean = sum_of(std::false_type{}, 0.0f);
    const float rstd = 1.0f / sqrtf(sum_of(std::true_type{}, mean) + a.eps);
    if (first == 0 && left > 0) {
      if (a.mean) a.mean[row] = mean;
      if (a.rstd) a.rstd[row] = rstd;
    }
#pragma unroll
    for (int k = 0; k < kPacks; ++k) {
      if (left <= k * step) continue;
      NormVectors<kCount> vectors;
      vectors.get(shared, k);
      store_normed<T>(a, vectors, row, first + k * step, left - k * step, packed, raw[k], mean, rstd);
    }
  }
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
      added<T>(a, row, c, left_of<T>(a.width, c), a.packed, load_raw(h + c, left_of<T>(a.width, c), a.packed),
               load_raw(residual + c, left_of<T>(a.width, c), a.packed));
    }
    h = static_cast<const T*>(a.h) + row * a.h_stride;
  }
  const auto sum_of = [&](auto squared, float mean, float* place) {
    float sum[1] = {0.0f};
    for (int64_t c = first; c < a.width; c += kStep) {
      float v[kCount];
      unpack(load_raw(h + c, left_of<T>(a.width, c), a.packed), v);
      sum[0] += deviation_sum<decltype(squared)::value>(v, mean, left_of<T>(a.width, c), a.packed);
    }
    row_sums(sum, 1, place);
    return sum[0] * a.share;
  };
  float mean = 0.0f;
  if constexpr (centred) mean = sum_of(std::false_type{}, 0.0f, room);
  const float rstd = 1.0f / sqrtf(sum_of(std::true_type{}, mean, room + kRowSumRoom<1>) + a.eps);
  if (threadIdx.x == 0) {
    if (a.mean) a.mean[row] = mean;
    if (a.rstd) a.rstd[row] = rstd;
  }
  for (int64_t c = first; c < a.width; c += kStep) {
    const int left = left_of<T>(a.width, c);
    NormVectors<kCount> vectors;
    vectors.load(a, c, left, a.packed);
    store_normed<T>(a, vectors, row, c, left, a.packed, load_raw(h + c, left, a.packed), mean, rstd);
  }
}

template <class T, bool centred, bool packed>
void start_norm_forward_rows(const NormPlan& p, const Launch& l, const NormForward& a) {
  switch (p.packs) {
    case 1:
      return launch<&norm_forward_rows<T, centred, 1, packed>>(l, a);
    case 2:
      return launch<&norm_forward_rows<T, centred, 2, packed>>(l, a);
    case 4:
      return launch<&norm_forward_rows<T, centred, 4, packed>>(l, a);
    default:
      return launch<&norm_forward_rows<T, centred, 8, packed>>(l, a);
  }
}

template <class T, bool centred>
void norm_forward(NormForward a) {
  a.packed = rows_are_packed<T>(a.width, a.x, a.x_stride, a.y, a.y_stride) &&
             (!a.residual || rows_are_packed<T>(a.width, a.residual, a.residual_stride, a.h, a.h_stride)) &&
             can_pack<float>(a.weight, 0) && can_pack<float>(a.bias, 0);
  if (a.offset == 0.0f) a.offset = -0.0f;  // which leaves -0 as it is
  a.share = 1.0f / static_cast<float>(a.width);
  const NormPlan p = norm_forward_plan(a.rows, divided_up(a.width, kPackElements<T>), limits());
  a.cluster = p.cluster;
  const Launch l{
      dim3(static_cast<unsigned>(p.blocks)),
      dim3(static_cast<unsigned>(p.lanes), static_cast<unsigned>(p.groups)),
      (kNormRoom + int64_t{2} * p.lanes * p.packs * kPackElements<T>)*static_cast<int64_t>(sizeof(float)),
      p.cluster};
  if (p.packs == 0) return launch<&norm_forward_wide<T, centred>>(l, a);
  if (a.packed) return start_norm_forward_rows<T, centred, true>(p, l, a);
  start_norm_forward_rows<T, centred, false>(p, l, a);
}

}  // namespace gptcore::cuda
