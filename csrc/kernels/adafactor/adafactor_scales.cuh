// What all tensors of a step of Adafactor share on CUDA, the gradients' factor, and what each makes of the step.
#pragma once

#include "kernels/adafactor/adafactor_items.cuh"

namespace gptcore::cuda {

constexpr int kSumThreads = 256;

// The sum of sums[begin .. end - 1], by the block's threads.
__device__ __forceinline__ double sum_of(const double* sums, int64_t begin, int64_t end, double* room) {
  double sum = 0;
  for (int64_t i = begin + threadIdx.x; i < end; i += kSumThreads) sum += sums[i];
  return block_sum(sum, room);
}

// The norm, where nobody has told it, and the gradients' factor.
static __global__ void __launch_bounds__(kSumThreads)
    find_factor(AdafactorSums a, int64_t chunks, GradientRule rule, bool known, DeviceResult result) {
  const double total = known ? 0.0 : sum_of(a.grads, 0, chunks, shared_memory<double>());
  if (threadIdx.x != 0) return;
  if (!known) rule.norm = {sqrt(total) / read_number(rule.scale)};
  const GradientFactor gradient = factor_of(rule);
  *a.control = {gradient.factor, gradient.skip};
  write_result(result, read_number(rule.norm));
}

// What RMS(p) and RMS(U) of a tensor of `size` elements make of its step.
__device__ __forceinline__ AdafactorScale scale_of(const AdafactorRates& rates, double k, int number,
                                                   double decay, double size, double params, double updates) {
  double step = read_each(rates.step_size, rates.each_step_size, number);
  if (rates.scale_parameter) step *= fmax(rates.eps2, sqrt(params / size));
  decay *= read_number(rates.decay_factor) * (rates.scaled_decay ? step : 1.0);
  if (rates.clip_threshold < INFINITY) step /= fmax(1.0, k * sqrt(updates / size) / rates.clip_threshold);
  return {static_cast<float>(1.0 - decay), static_cast<float>((rates.maximize ? -step : step) * k)};
}

// A block for each tensor, which also counts the update.
static __global__ void __launch_bounds__(kSumThreads)
    find_scales(AdafactorSums a, int64_t chunks, const __grid_constant__ AdafactorRates rates) {
  if (a.control->skip) return;
  double* const room = shared_memory<double>();
  const auto which = static_cast<int>(blockIdx.x);
  const AdafactorItem& item = a.items[which];
  const AdafactorTensor& t = item.tensor;
  const int64_t begin = item.first_chunk, end = which + 1 < a.count ? a.items[which + 1].first_chunk : chunks;
  const double params = rates.scale_parameter ? sum_of(a.params, begin, end, room) : 0.0;
  __syncthreads();
  double updates = *item.update_sum;
  if (isnan(updates) && rates.clip_threshold < INFINITY) updates = sum_of(a.updates, begin, end, room);
  if (threadIdx.x != 0) return;
  a.scales[item.number] = scale_of(rates, a.control->factor, item.number, item.decay,
                                   static_cast<double>(t.slices * t.rows * t.cols), params, updates);
  if (item.count) *item.count += 1.0f;
}

}  // namespace gptcore::cuda
