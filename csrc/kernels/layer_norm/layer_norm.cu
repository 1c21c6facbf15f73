// Layer normalisation on CUDA: a block a row, the row read once from memory.
#include "core/cuda/launch.cuh"
#include "core/cuda/pack.cuh"
#include "core/cuda/reduce.cuh"
#include "kernels/layer_norm/layer_norm_body.h"

namespace gptcore::cuda {
namespace {

constexpr int kThreads = 256;

template <class T>
__global__ void __launch_bounds__(kThreads) forward_rows(const LayerNormForward a) {
  float* room = shared_memory<float>();
  const int64_t row = blockIdx.x;
  const T* x = static_cast<const T*>(a.x) + row * a.x_stride;
  const T* residual = a.residual ? static_cast<const T*>(a.residual) + row * a.residual_stride : nullptr;
  T* h = a.h ? static_cast<T*>(a.h) + row * a.h_stride : nullptr;
  T* y = static_cast<T*>(a.y) + row * a.y_stride;
  const auto at = [&](int64_t c) {
    return residual ? to_float(from_float<T>(to_float(x[c]) + to_float(residual[c]))) : to_float(x[c]);
  };
  const auto vector = [&](const void* v, int64_t c) {
    return a.bf16_weight ? to_float(static_cast<const bf16*>(v)[c]) : static_cast<const float*>(v)[c];
  };
  float sum = 0.0f;
  for (int64_t c = threadIdx.x; c < a.width; c += kThreads) sum += at(c);
  const float mean = block_reduce(sum, room) / static_cast<float>(a.width);
  __syncthreads();
  float squares = 0.0f;
  for (int64_t c = threadIdx.x; c < a.width; c += kThreads) {
    const float d = at(c) - mean;
    squares += d * d;
  }
  const float rstd = rsqrtf(block_reduce(squares, room) / static_cast<float>(a.width) + a.eps);
  if (a.mean && threadIdx.x == 0) a.mean[row] = mean, a.rstd[row] = rstd;
  for (int64_t c = threadIdx.x; c < a.width; c += kThreads) {
    const float value = at(c);
    if (h) h[c] = from_float<T>(value);
    float scaled = (value - mean) * rstd;
    if (a.weight) scaled *= vector(a.weight, c) + a.weight_offset;
    if (a.bias) scaled += vector(a.bias, c);
    y[c] = from_float<T>(scaled);
  }
}

template <class T>
void forward(const LayerNormForward& a) {
  launch<&forward_rows<T>>({dim3(static_cast<unsigned>(a.rows)), dim3(kThreads), 32 * sizeof(float)}, a);
}

template <class T>
__global__ void __launch_bounds__(kThreads) backward_rows(const LayerNormBackward a) {
  float* room = shared_memory<float>();
  const int64_t row = blockIdx.x;
  const T* dy = static_cast<const T*>(a.grad_y) + row * a.grad_y_stride;
  const T* h = static_cast<const T*>(a.h) + row * a.h_stride;
  const T* dh = a.grad_h ? static_cast<const T*>(a.grad_h) + row * a.grad_h_stride : nullptr;
  T* dx = static_cast<T*>(a.dx) + row * a.dx_stride;
  const float mean = a.mean[row], rstd = a.rstd[row];
  const auto weighted = [&](int64_t c) {
    const float g = to_float(dy[c]);
    if (!a.weight) return g;
    const float w = a.bf16_weight ? to_float(static_cast<const bf16*>(a.weight)[c])
                                  : static_cast<const float*>(a.weight)[c];
    return g * (w + a.weight_offset);
  };
  const auto normed = [&](int64_t c) { return (to_float(h[c]) - mean) * rstd; };
  float sum = 0.0f, product = 0.0f;
  for (int64_t c = threadIdx.x; c < a.width; c += kThreads) {
    sum += weighted(c);
    product += weighted(c) * normed(c);
  }
  sum = block_reduce(sum, room) / static_cast<float>(a.width);
  product = block_reduce(product, room + kWarp) / static_cast<float>(a.width);
  for (int64_t c = threadIdx.x; c < a.width; c += kThreads) {
    float d = (weighted(c) - sum - normed(c) * product) * rstd;
    if (dh) d += to_float(dh[c]);
    dx[c] = from_float<T>(d);
  }
}

// A thread a column.
template <class T>
__global__ void __launch_bounds__(kThreads) backward_columns(const LayerNormBackward a) {
  const int64_t c = blockIdx.x * int64_t{kThreads} + threadIdx.x;
  if (c >= a.width) return;
  float dweight = 0.0f, dbias = 0.0f;
  for (int64_t row = 0; row < a.rows; ++row) {
    const float g = to_float(static_cast<const T*>(a.grad_y)[row * a.grad_y_stride + c]);
    const float h = to_float(static_cast<const T*>(a.h)[row * a.h_stride + c]);
    dweight += g * ((h - a.mean[row]) * a.rstd[row]);
    dbias += g;
  }
  const auto put = [&](void* out, float x) {
    if (!out) return;
    if (a.bf16_dweight) {
      static_cast<bf16*>(out)[c] = from_float<bf16>(x);
    } else {
      static_cast<float*>(out)[c] = x;
    }
  };
  put(a.dweight, dweight), put(a.dbias, dbias);
}

template <class T>
void backward(const LayerNormBackward& a) {
  launch<&backward_rows<T>>({dim3(static_cast<unsigned>(a.rows)), dim3(kThreads), 2 * kWarp * sizeof(float)},
                            a);
  if (!a.dweight && !a.dbias) return;
  const auto blocks = static_cast<unsigned>((a.width + kThreads - 1) / kThreads);
  launch<&backward_columns<T>>({dim3(blocks), dim3(kThreads)}, a);
}

}  // namespace

GPTCORE_CUDA_BODIES(LayerNormBodies, layer_norm_bodies) = {{forward<float>, forward<bf16>},
                                                           {backward<float>, backward<bf16>}};

}  // namespace gptcore::cuda
