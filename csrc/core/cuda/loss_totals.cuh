// Sums over the rows of core/loss_rows.h, before and after its row kernels: one block, in a fixed order.
#pragma once

#include "core/cuda/launch.cuh"
#include "core/cuda/logits.cuh"

namespace gptcore::cuda {
namespace {

constexpr int kSumThreads = 512;

// The sum of what `value` says of 0 to count - 1, in thread 0.
template <class Value>
__device__ __forceinline__ double block_total(int64_t count, double* room, const Value& value) {
  double sum = 0.0;
  for (int64_t i = threadIdx.x; i < count; i += kSumThreads) sum += value(i);
  room[threadIdx.x] = sum;
  for (int half = kSumThreads / 2; half > 0; half /= 2) {
    __syncthreads();
    if (static_cast<int>(threadIdx.x) < half) room[threadIdx.x] += room[threadIdx.x + half];
  }
  __syncthreads();
  const double total = room[0];
  __syncthreads();
  return total;
}

__global__ void __launch_bounds__(kSumThreads, 1) loss_divisors(const LossDivisors a) {
  double* room = shared_memory<double>();
  const auto weight = [&](int64_t n) { return a.token_weight ? a.token_weight[n] : 1.0f; };
  const auto counts = [&](int64_t n) { return a.targets[n] != a.ignore_index; };
  double loss = 1.0, z = 1.0;
  if (a.mean) {
    loss = block_total(a.rows, room, [&](int64_t n) {
      if (!counts(n)) return 0.0;
      const int64_t t = a.targets[n];
      const bool known = t >= 0 && t < a.classes;
      return static_cast<double>(weight(n)) * (a.class_weight.data && known ? at(a.class_weight, t) : 1.0f);
    });
    z = block_total(a.rows, room,
                    [&](int64_t n) { return counts(n) ? static_cast<double>(weight(n)) : 0.0; });
  }
  double classes = static_cast<double>(a.classes);
  if (a.class_weight.data) {
    classes =
        block_total(a.classes, room, [&](int64_t c) { return static_cast<double>(at(a.class_weight, c)); });
  }
  if (threadIdx.x == 0) a.divisors[0] = loss, a.divisors[1] = z, a.divisors[2] = classes;
}

__device__ __forceinline__ void store_loss(const LossTotals& a, int64_t place, double value) {
  if (a.bf16_loss) {
    static_cast<bf16*>(a.loss)[place] = from_float<bf16>(static_cast<float>(value));
  } else {
    static_cast<float*>(a.loss)[place] = static_cast<float>(value);
  }
}

__global__ void __launch_bounds__(kSumThreads, 1) loss_totals(const LossTotals a) {
  double* room = shared_memory<double>();
  if (a.per_row) {
    const int64_t n = int64_t{blockIdx.x} * kSumThreads + threadIdx.x;
    if (n >= a.rows) return;
    store_loss(a, n * a.loss_stride, a.row_loss[n]);
    if (a.z) static_cast<float*>(a.z)[n * a.z_stride] = static_cast<float>(a.row_z[n]);
    return;
  }
  const double loss = block_total(a.rows, room, [&](int64_t n) { return a.row_loss[n]; });
  if (threadIdx.x == 0) store_loss(a, 0, loss / a.divisors[0]);
  if (!a.z) return;
  const double z = block_total(a.rows, room, [&](int64_t n) { return a.row_z[n]; });
  if (threadIdx.x == 0) *static_cast<float*>(a.z) = static_cast<float>(z / a.divisors[1]);
}

inline void run_loss_divisors(const LossDivisors& a) {
  launch<&loss_divisors>({dim3(1), dim3(kSumThreads), kSumThreads * sizeof(double)}, a);
}

inline void run_loss_totals(const LossTotals& a) {
  const int64_t blocks = a.per_row ? (a.rows + kSumThreads - 1) / kSumThreads : 1;
  launch<&loss_totals>({dim3(static_cast<unsigned>(blocks)), dim3(kSumThreads), kSumThreads * sizeof(double)},
                       a);
}

}  // namespace
}  // namespace gptcore::cuda
