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

}  // namespace

GPTCORE_CUDA_BODIES(LayerNormBodies, layer_norm_bodies) = {{forward<float>, forward<bf16>},
                                                           {nullptr, nullptr}};

}  // namespace gptcore::cuda
