// Activations and their gated forms on CUDA: a thread has a pack of columns, of one row after another.
//
// Without biases and gaps all rows are one. Where gradients of biases are wanted, threads stay for many rows and sum
// them in registers; blocks leave their parts, which a second kernel adds in order.
#include "core/cuda/column_sums.cuh"
#include "core/cuda/grid_of_rows.cuh"
#include "core/cuda/row_packs.cuh"
#include "core/cuda/scratch.h"
#include "kernels/gated_activation/gated_activation.h"
#include "kernels/gated_activation/gated_activation_body.h"
#include "kernels/gated_activation/gated_activation_device.cuh"

namespace gptcore::cuda {
namespace {

constexpr int kThreads = 256;
// Blocks that sum over rows: three on each of 132 multiprocessors, by the shape and not by the device at hand.
constexpr int kSummingResident = 3;
constexpr int64_t kSummingBlocks = 132 * kSummingResident;

template <class T>
__device__ __forceinline__ void load_biased(const void* x, const void* bias, bool bf16_bias, int64_t at,
                                            int64_t c, int left, bool packed, float (&v)[kPackElements<T>]) {
  unpack(load_raw(static_cast<const T*>(x) + at, left, packed), v);
  if (!bias) return;
  float b[kPackElements<T>];
  load_vector(bias, bf16_bias, c, left, packed, 0.0f, b);
#pragma unroll
  for (int i = 0; i < kPackElements<T>; ++i) v[i] += b[i];
}

template <class T, class Act>
__global__ void __launch_bounds__(kThreads) forward_columns(const GatedActivationForward a, bool packed) {
  constexpr int kCount = kPackElements<T>;
  const int64_t c = (int64_t{blockIdx.x} * blockDim.x + threadIdx.x) * kCount;
  if (c >= a.width) return;
  const int left = left_of<T>(a.width, c);
  for (int64_t row = int64_t{blockIdx.y} * blockDim.y + threadIdx.y; row < a.rows;
       row += int64_t{gridDim.y} * blockDim.y) {
    float v[kCount];
    load_biased<T>(a.gate, a.gate_bias, a.bf16_bias, row * a.gate_stride + c, c, left, packed, v);
    if (a.up) {
      float u[kCount];
      load_biased<T>(a.up, a.up_bias, a.bf16_bias, row * a.up_stride + c, c, left, packed, u);
#pragma unroll
      for (int i = 0; i < kCount; ++i) v[i] = Act::value(v[i]) * u[i];
    } else {
#pragma unroll
      for (int i = 0; i < kCount; ++i) v[i] = Act::value(v[i]);
    }
    store_some(static_cast<T*>(a.y) + row * a.y_stride + c, v, left, packed);
  }
}

// Writes a row's gradients from column c on; `dgate` is left for sums over rows, and `dup`, 0 in the plain form.
template <class T, class Act>
__device__ __forceinline__ void backward_pack(const GatedActivationBackward& a, int64_t row, int64_t c,
                                              int left, bool packed, float (&dgate)[kPackElements<T>],
                                              float (&dup)[kPackElements<T>]) {
  constexpr int kCount = kPackElements<T>;
  float x[kCount], u[kCount];
  load_biased<T>(a.gate, a.gate_bias, a.bf16_bias, row * a.gate_stride + c, c, left, packed, x);
  load_biased<T>(a.grad_y, nullptr, false, row * a.grad_y_stride + c, c, left, packed, dgate);
  if (a.up) load_biased<T>(a.up, a.up_bias, a.bf16_bias, row * a.up_stride + c, c, left, packed, u);
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    float value;
    const float slope = Act::slope(x[i], &value);
    dup[i] = 0.0f;
    if (a.up) dup[i] = dgate[i] * value, dgate[i] *= u[i];
    dgate[i] *= slope;
  }
  store_some(static_cast<T*>(a.dgate) + row * a.dgate_stride + c, dgate, left, packed);
  if (a.up) store_some(static_cast<T*>(a.dup) + row * a.dup_stride + c, dup, left, packed);
}

// The block's sums over its groups of threads, in order, to its row of the parts.
template <int kCount>
__device__ __forceinline__ void store_part(const float (&sums)[kCount], int64_t width, float* part) {
  float* room = shared_memory<float>();
  const int lanes = static_cast<int>(blockDim.x), groups = static_cast<int>(blockDim.y);
  const int threads = lanes * groups, thread = static_cast<int>(threadIdx.y * blockDim.x + threadIdx.x);
  __syncthreads();  // the room may still be read
#pragma unroll
  for (int i = 0; i < kCount; ++i) room[i * threads + thread] = sums[i];
  __syncthreads();
  for (int at = thread; at < lanes * kCount; at += threads) {
    const int i = at % kCount, lane_at = at / kCount;
    float sum = 0.0f;
    for (int group = 0; group < groups; ++group) sum += room[i * threads + group * lanes + lane_at];
    const int64_t c = int64_t{blockIdx.x} * lanes * kCount + at;
    if (c < width) part[c] = sum;
  }
}

// With sums, parts is (gridDim.y, 2, width).
template <class T, class Act, bool sums>
__global__ void __launch_bounds__(kThreads, kSummingResident)
    backward_columns(const GatedActivationBackward a, bool packed, float* parts) {
  constexpr int kCount = kPackElements<T>;
  const int64_t c = (int64_t{blockIdx.x} * blockDim.x + threadIdx.x) * kCount;
  const int left = c < a.width ? left_of<T>(a.width, c) : 0;
  float dgate_sums[kCount] = {}, dup_sums[kCount] = {};
  for (int64_t row = int64_t{blockIdx.y} * blockDim.y + threadIdx.y; left > 0 && row < a.rows;
       row += int64_t{gridDim.y} * blockDim.y) {
    float dgate[kCount], dup[kCount];
    backward_pack<T, Act>(a, row, c, left, packed, dgate, dup);
    if constexpr (sums) {
#pragma unroll
      for (int i = 0; i < kCount; ++i) dgate_sums[i] += dgate[i], dup_sums[i] += dup[i];
    }
  }
  if constexpr (sums) {
    parts += 2 * int64_t{blockIdx.y} * a.width;
    if (a.dgate_bias) store_part(dgate_sums, a.width, parts);
    if (a.dup_bias) store_part(dup_sums, a.width, parts + a.width);
  }
}

template <class T, class Act>
void forward_as(const GatedActivationForward& a) {
  const bool packed = rows_are_packed<T>(a.width, a.gate, a.gate_stride, a.y, a.y_stride) &&
                      (!a.up || rows_are_packed<T>(a.width, a.up, a.up_stride)) &&
                      can_pack<float>(a.gate_bias, 0) && can_pack<float>(a.up_bias, 0);
  constexpr int kCount = kPackElements<T>;
  const GridOfRows g = grid_of_rows(a.rows, (a.width + kCount - 1) / kCount, kThreads, 65535);
  launch<&forward_columns<T, Act>>({g.grid(), g.block()}, a, packed);
}

template <class T, class Act>
void backward_as(const GatedActivationBackward& a) {
  const bool packed = rows_are_packed<T>(a.width, a.grad_y, a.grad_y_stride, a.gate, a.gate_stride, a.dgate,
                                         a.dgate_stride) &&
                      (!a.up || rows_are_packed<T>(a.width, a.up, a.up_stride, a.dup, a.dup_stride)) &&
                      can_pack<float>(a.gate_bias, 0) && can_pack<float>(a.up_bias, 0);
  constexpr int kCount = kPackElements<T>;
  const int64_t row_packs = (a.width + kCount - 1) / kCount;
  if (!a.dgate_bias && !a.dup_bias) {
    const GridOfRows g = grid_of_rows(a.rows, row_packs, kThreads, 65535);
    return launch<&backward_columns<T, Act, false>>({g.grid(), g.block()}, a, packed,
                                                    static_cast<float*>(nullptr));
  }
  const int64_t across = (row_packs + kThreads - 1) / kThreads;
  const GridOfRows g = grid_of_rows(a.rows, row_packs, kThreads, (kSummingBlocks + across - 1) / across);
  constexpr int64_t kFloat = sizeof(float);
  const DeviceScratch scratch(g.down * 2 * a.width * kFloat);
  float* parts = scratch.as<float>();
  launch<&backward_columns<T, Act, true>>({g.grid(), g.block(), g.lanes * g.groups * kCount * kFloat}, a,
                                          packed, parts);
  add_columns({parts, g.down, 2 * a.width, a.width, {a.dgate_bias, a.dup_bias}, a.bf16_dbias});
}

template <class T>
void forward(const GatedActivationForward& a) {
  switch (a.activation) {
    case kGeluTanh:
      return forward_as<T, GeluTanh<T>>(a);
    case kGeluErf:
      return forward_as<T, GeluErf<T>>(a);
    case kSilu:
      return forward_as<T, Silu<T>>(a);
    default:
      return forward_as<T, Relu<T>>(a);
  }
}

template <class T>
void backward(const GatedActivationBackward& a) {
  switch (a.activation) {
    case kGeluTanh:
      return backward_as<T, GeluTanh<T>>(a);
    case kGeluErf:
      return backward_as<T, GeluErf<T>>(a);
    case kSilu:
      return backward_as<T, Silu<T>>(a);
    default:
      return backward_as<T, Relu<T>>(a);
  }
}

}  // namespace

GPTCORE_CUDA_BODIES(GatedActivationBodies, gated_activation_bodies) = {{forward<float>, forward<bf16>},
                                                                       {backward<float>, backward<bf16>}};

}  // namespace gptcore::cuda
