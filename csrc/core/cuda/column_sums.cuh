// Sums over rows, of which blocks have left parts: the parts added in order.
#pragma once

#include "core/cuda/launch.cuh"
#include "core/cuda/pack.cuh"

namespace gptcore::cuda {

// `parts` rows of f32, `stride` apart; each half of a row, `width` elements, goes to its own vector if there is one.
struct ColumnSums {
  const float* parts;
  int64_t count, stride, width;
  void* out[2];
  bool bf16_out;
};

constexpr int kColumnSlices = 32;  // parts that are read side by side

__device__ __forceinline__ void store_column(void* out, bool is_bf16, int64_t c, float x) {
  if (is_bf16) {
    static_cast<bf16*>(out)[c] = from_float<bf16>(x);
  } else {
    static_cast<float*>(out)[c] = x;
  }
}

// A warp takes every kColumnSlices'th part of 32 columns, the first one adds what they have.
static __global__ void __launch_bounds__(kColumnSlices* kWarp) add_column_parts(const ColumnSums a) {
  float* room = shared_memory<float>();
  const int64_t c = int64_t{blockIdx.x} * kWarp + threadIdx.x;
  void* out = blockIdx.y ? a.out[1] : a.out[0];  // no index into arguments, which would copy them
  if (!out) return;
  const float* parts = a.parts + blockIdx.y * a.width;
  float sum = 0.0f;
  if (c < a.width) {
#pragma unroll 4
    for (int64_t i = threadIdx.y; i < a.count; i += kColumnSlices) sum += parts[i * a.stride + c];
  }
  room[threadIdx.y * kWarp + threadIdx.x] = sum;
  __syncthreads();
  if (threadIdx.y != 0 || c >= a.width) return;
#pragma unroll
  for (int i = 1; i < kColumnSlices; ++i) sum += room[i * kWarp + static_cast<int>(threadIdx.x)];
  store_column(out, a.bf16_out, c, sum);
}

inline void add_columns(const ColumnSums& a) {
  launch<&add_column_parts>({dim3(static_cast<unsigned>((a.width + kWarp - 1) / kWarp), a.out[1] ? 2 : 1),
                             dim3(kWarp, kColumnSlices), kColumnSlices * kWarp * sizeof(float)},
                            a);
}

}  // namespace gptcore::cuda
