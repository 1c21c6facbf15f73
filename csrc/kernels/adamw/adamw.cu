// AdamW on CUDA: a block of threads for 8,192 elements of a tensor. One kernel for all its forms: what they differ in
// is the same for a whole block, and memory is what all of them wait for.
#include "core/cuda/adam_numbers.cuh"
#include "core/cuda/four.cuh"
#include "core/cuda/scratch.h"
#include "kernels/adamw/adamw_body.h"

namespace gptcore::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int64_t kChunk = 8192;

struct Entry {
  void* param;  // f32, or bf16 where it is split
  void* half;   // the other half of a split parameter, or a bf16 copy; may be null
  float *exp_avg, *exp_avg_sq, *max_exp_avg_sq;
  const void* grad;
  double decay;
  int64_t size;
  int32_t number;
  bool bf16_grad, split, aligned;
};
using Table = TensorTable<Entry>;

struct Rates {
  float beta2, rest1, rest2, eps;
  bool decoupled;
};

// --- split parameters: bits = (weight << 16) + low, see adamw.h --------------------------------------------

__device__ __forceinline__ float join(bf16 weight, int16_t low) {
  const uint32_t upper = uint32_t{weight.bits} << 16;
  const bool below_zero = upper << 1 == 0 && low < 0;
  return __uint_as_float(upper + (below_zero ? 0u : static_cast<uint32_t>(static_cast<int32_t>(low))));
}

__device__ __forceinline__ void split(float x, bf16* weight, int16_t* low) {
  const uint32_t bits = __float_as_uint(x);
  const bool whole = x == x;
  weight->bits = static_cast<uint16_t>(whole ? (bits + 0x8000u) >> 16 : (bits >> 16 | 0x40u));
  *low = static_cast<int16_t>(whole ? bits & 0xffffu : 0u);
}

// A parameter's four elements as they lie in memory.
struct Params {
  Four<float> whole;
  Four<bf16> weight;
  Four<int16_t> low;
};

template <bool whole>
__device__ __forceinline__ Params load_params(const Entry& t, int64_t i, int64_t n) {
  Params p{};
  if (t.split) {
    p.weight = load_four<whole>(static_cast<const bf16*>(t.param) + i, n);
    p.low = load_four<whole>(static_cast<const int16_t*>(t.half) + i, n);
  } else {
    p.whole = load_four<whole>(static_cast<const float*>(t.param) + i, n);
  }
  return p;
}

template <bool whole>
__device__ __forceinline__ void store_params(const Entry& t, int64_t i, int64_t n, const Four<float>& x) {
  if (t.split) {
    Params p;
#pragma unroll
    for (int k = 0; k < 4; ++k) split(x.at[k], &p.weight.at[k], &p.low.at[k]);
    store_four<whole>(static_cast<bf16*>(t.param) + i, p.weight, n);
    store_four<whole>(static_cast<int16_t*>(t.half) + i, p.low, n);
    return;
  }
  store_four<whole>(static_cast<float*>(t.param) + i, x, n);
  if (t.half) store_four<whole>(static_cast<bf16*>(t.half) + i, rounded<bf16>(x), n);
}

// --- update ------------------------------------------------------------------------------------------------

struct Numbers {
  float grad_factor, step_size, root_factor, keep, l2;
};

template <bool whole>
__device__ __forceinline__ void update_four(const Entry& t, int64_t i, int64_t n, const Numbers& a,
                                            const Rates& rates) {
  const GradFour raw = load_grad<whole>(t.grad, t.bf16_grad, i, n);
  const Params params = load_params<whole>(t, i, n);
  Four<float> m = load_four<whole>(t.exp_avg + i, n), v = load_four<whole>(t.exp_avg_sq + i, n), w{};
  if (t.max_exp_avg_sq) w = load_four<whole>(t.max_exp_avg_sq + i, n);
  const Four<float> grad = widened(raw, t.bf16_grad);
  Four<float> p;
#pragma unroll
  for (int k = 0; k < 4; ++k) {
    const float before = t.split ? join(params.weight.at[k], params.low.at[k]) : params.whole.at[k];
    float g = grad.at[k] * a.grad_factor;
    if (a.l2 != 0) g += before * a.l2;  // an infinite parameter has no product with 0
    m.at[k] += (g - m.at[k]) * rates.rest1;
    v.at[k] = v.at[k] * rates.beta2 + g * g * rates.rest2;
    w.at[k] = t.max_exp_avg_sq && w.at[k] > v.at[k] ? w.at[k] : v.at[k];
    p.at[k] = before * a.keep - (m.at[k] * a.step_size) / (sqrtf(w.at[k]) * a.root_factor + rates.eps);
  }
  store_four<whole>(t.exp_avg + i, m, n);
  store_four<whole>(t.exp_avg_sq + i, v, n);
  if (t.max_exp_avg_sq) store_four<whole>(t.max_exp_avg_sq + i, w, n);
  store_params<whole>(t, i, n, p);
}

__global__ void __launch_bounds__(kThreads, 4)
    update_chunks(const __grid_constant__ Table table, Rates rates, const AdamControl* control,
                  const AdamFactors* factors) {
  const AdamControl c = *control;
  if (c.skip) return;
  const int which = table.find(static_cast<int>(blockIdx.x));
  const Entry t = table.entries[which];
  const AdamFactors own = factors[t.number];
  const Numbers a = {static_cast<float>(c.factor), own.step_size, own.root_factor,
                     rates.decoupled ? static_cast<float>(1.0 - c.lr * t.decay) : 1.0f,
                     rates.decoupled ? 0.0f : static_cast<float>(t.decay)};
  const int64_t begin = (static_cast<int>(blockIdx.x) - table.first[which]) * kChunk;
  const int64_t end = t.size - begin < kChunk ? t.size : begin + kChunk;
  for (int64_t i = begin + int64_t{threadIdx.x} * 4; i < end; i += kThreads * 4) {
    t.aligned&& end - i >= 4 ? update_four<true>(t, i, end - i, a, rates)
                             : update_four<false>(t, i, end - i, a, rates);
  }
}

bool fits_fours(const AdamwTensor& t) {
  return cuda::fits_fours(t.param) && cuda::fits_fours(t.weight) && cuda::fits_fours(t.low) &&
         cuda::fits_fours(t.exp_avg) && cuda::fits_fours(t.exp_avg_sq) &&
         cuda::fits_fours(t.max_exp_avg_sq) && cuda::fits_fours(t.copy) &&
         (t.bf16_grad ? cuda::fits_fours(static_cast<const bf16*>(t.grad))
                      : cuda::fits_fours(static_cast<const float*>(t.grad)));
}

void step(const AdamwTensor* tensors, const int64_t* sizes, const double* weight_decay, int64_t count,
          bool decoupled, const AdamStep& a) {
  const auto factor_bytes = count * static_cast<int64_t>(sizeof(AdamFactors));
  const DeviceScratch scratch(static_cast<int64_t>(sizeof(AdamControl)) + factor_bytes);
  auto* const control = scratch.as<AdamControl>();
  auto* const factors = reinterpret_cast<AdamFactors*>(control + 1);
  start_adam_numbers(a, count, control, factors);
  const Rates rates = {static_cast<float>(a.beta2), static_cast<float>(1.0 - a.beta1),
                       static_cast<float>(1.0 - a.beta2), static_cast<float>(a.eps), decoupled};
  const auto make = [&](int64_t i, Entry* entry) {
    const AdamwTensor& t = tensors[i];
    const bool split = t.low != nullptr;
    *entry = {split ? static_cast<void*>(t.weight) : t.param,
              split ? static_cast<void*>(t.low) : t.copy,
              t.exp_avg,
              t.exp_avg_sq,
              t.max_exp_avg_sq,
              t.grad,
              weight_decay[i],
              sizes[i],
              static_cast<int32_t>(i),
              t.bf16_grad,
              split,
              fits_fours(t)};
    return (sizes[i] + kChunk - 1) / kChunk;
  };
  for_tables<Entry>(count, make, [&](const Table& table, unsigned blocks) {
    launch<&update_chunks>({dim3(blocks), dim3(kThreads)}, table, rates,
                           static_cast<const AdamControl*>(control),
                           static_cast<const AdamFactors*>(factors));
  });
}

}  // namespace

GPTCORE_CUDA_BODIES(AdamwBodies, adamw_bodies) = {nullptr, step};

}  // namespace gptcore::cuda
