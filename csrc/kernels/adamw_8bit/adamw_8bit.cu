// 8-bit AdamW on CUDA: a warp for each block of 256 elements, eight to a lane. Lane l has elements 4 l .. 4 l + 3 and
// 128 + 4 l .. 128 + 4 l + 3, whose random bits are the lower and upper halves of one counter's four words.
#include <algorithm>
#include <type_traits>

#include "core/cuda/adam_numbers.cuh"
#include "core/cuda/approximate.cuh"
#include "core/cuda/four.cuh"
#include "core/cuda/philox.cuh"
#include "core/cuda/scratch.h"
#include "kernels/adamw_8bit/adamw_8bit_body.h"
#include "kernels/adamw_8bit/dynamic_map_tables.h"

namespace gptcore::cuda {
namespace {

constexpr int kThreads = 256, kWarps = kThreads / kWarp;
constexpr int64_t kChunkBlocks = 32;  // of 256 elements, for a block of threads

struct Entry {
  Adamw8bitTensor tensor;
  double decay;
  int64_t size;
  int32_t index;
  bool aligned;
};
using Table = TensorTable<Entry>;

struct Rates {
  float beta1, beta2, eps;
  float mean_factor, square_root;  // beside the gradients' factor: 1 - beta1, and the root of 1 - beta2
  uint64_t seed;
};

// The root of the least normal number, below which roots are 0: no denominator is.
constexpr float kLeastEps = 1.0842022e-19f;

// Of one block of elements.
struct Numbers {
  float mean_factor, square_root, step_size, root_factor, keep;
  float m_scale, v_scale;
};

// --- the map -----------------------------------------------------------------------------------------------

struct Maps {
  DynamicMap both_signs, positive;
};

struct SharedMap {
  float value[256], border[32], slope[16];
};

// Called by 256 threads.
__device__ __forceinline__ void fill(SharedMap* shared, const DynamicMap& map, bool both_signs) {
  const int i = static_cast<int>(threadIdx.x);
  const float number =
      both_signs ? static_cast<float>(i - kSignedZero) * kSignedUnit : static_cast<float>(i + 1);
  const int exponent = static_cast<int>(__float_as_uint(number) >> 23 & 15);
  const float start = map.start[exponent];
  shared->value[i] = (number < 0 ? -start : start) + map.step[exponent] * number;
  if (i < 32) shared->border[i] = map.border[i];
  if (i < 16) shared->slope[i] = map.slope[i];
}

// Place of the magnitude y, kLeastMagnitude to 1, in the lowest byte.
__device__ __forceinline__ uint32_t place_of(float y, const SharedMap& map) {
  const float border = map.border[__float_as_uint(y) >> 23 & 31];
  const uint32_t rotation =
      __float_as_uint(border) + (__float_as_uint(border - y) >> 31);  // one more above it
  const float mantissa = fminf(y * map.slope[rotation & 15] + 8.0f / 9, 1.9999999f);
  const uint32_t whole = (__float_as_uint(mantissa) & 0x7fffffu) | 0x800000u;
  return rotate_left(whole, rotation);
}
__device__ __forceinline__ uint8_t signed_code(float y, const SharedMap& map) {
  y = fmaxf(y, -0.99f);  // there is no -1
  const uint32_t place = place_of(fmaxf(fabsf(y), kLeastMagnitude), map);
  return static_cast<uint8_t>(y < 0 ? kSignedZero - place : kSignedZero + place);
}
// One more than the code.
__device__ __forceinline__ uint8_t unsigned_place(float y, const SharedMap& map) {
  return static_cast<uint8_t>(place_of(fmaxf(y, kLeastMagnitude), map));
}

// The scale of a block, and what its moments are multiplied by.
__device__ __forceinline__ float scale_of(float largest, float* inverse) {
  largest = __uint_as_float(warp_largest(__float_as_uint(largest)));
  const bool some = largest >= kLeastScale;
  *inverse = some ? reciprocal_in_range(largest) : 0.0f;
  return some ? largest : 0.0f;
}

// --- update ------------------------------------------------------------------------------------------------

// p as bf16 in the upper half, up with the odds that its lower half is of the way; NaN stays NaN, infinities stay.
__device__ __forceinline__ uint32_t round_by(float p, uint32_t random) {
  return __float_as_uint(p) + (p == p ? random : 0u);
}

// Arrays of f32 and bf16 are known when code is made: picking by a flag costs three instructions an element.
template <bool half>
using Held = std::conditional_t<half, bf16, float>;

// Four parameters by their random bits, or with a copy.
template <bool whole, bool half_param>
__device__ __forceinline__ void store_params(const Adamw8bitTensor& t, int64_t i, int64_t n,
                                             const Four<float>& p, const PhiloxWords& words, int shift) {
  if constexpr (half_param) {
    uint32_t sums[4];
#pragma unroll
    for (int k = 0; k < 4; ++k) sums[k] = round_by(p.at[k], words.at[k] >> shift & 0xffffu);
    bf16* const to = static_cast<bf16*>(t.param) + i;
    if constexpr (whole) {
      store_vector(to, make_uint2(upper_halves(sums[0], sums[1]), upper_halves(sums[2], sums[3])));
    } else {
#pragma unroll
      for (int k = 0; k < 4; ++k) {
        if (k < n) to[k] = {static_cast<uint16_t>(sums[k] >> 16)};
      }
    }
  } else {
    store_four<whole>(static_cast<float*>(t.param) + i, p, n);
    if (t.copy) store_four<whole>(t.copy + i, rounded<bf16>(p), n);
  }
}

// Four elements as they come from memory.
template <bool half_grad, bool half_param>
struct Loaded {
  Four<Held<half_grad>> grad;
  Four<Held<half_param>> param;
  Four<uint8_t> m, v;
};

template <bool whole, bool half_grad, bool half_param>
__device__ __forceinline__ Loaded<half_grad, half_param> load(const Adamw8bitTensor& t, int64_t i,
                                                              int64_t n) {
  return {load_four<whole>(static_cast<const Held<half_grad>*>(t.grad) + i, n),
          load_four<whole>(static_cast<const Held<half_param>*>(t.param) + i, n),
          load_four<whole>(t.exp_avg + i, n), load_four<whole>(t.exp_avg_sq + i, n)};
}

// Four elements, of which n exist; m and v are left for the codes. Returns the parameters.
template <bool whole, bool half_grad, bool half_param>
__device__ __forceinline__ Four<float> update_four(const Loaded<half_grad, half_param>& x, int64_t n,
                                                   const Numbers& a, float eps, const SharedMap* maps,
                                                   Four<float>* m, Four<float>* v) {
  const Four<float> grad = widened(x.grad), before = widened(x.param);
  Four<float> p;
#pragma unroll
  for (int k = 0; k < 4; ++k) {
    const float g = grad.at[k], root = g * a.square_root;
    const float mean = maps[0].value[x.m.at[k]] * a.m_scale + g * a.mean_factor;
    const float square = fminf(maps[1].value[x.v.at[k]] * a.v_scale + root * root, kLargestMoment);
    const float denominator = sqrt_flushed(square) * a.root_factor + eps;
    p.at[k] = before.at[k] * a.keep - (mean * a.step_size) * reciprocal_approximate(denominator);
    m->at[k] = whole || k < n ? mean : 0.0f;
    v->at[k] = whole || k < n ? square : 0.0f;
  }
  return p;
}

__device__ __forceinline__ float largest_of(const Four<float> (&x)[2]) {
  float largest = 0.0f;
#pragma unroll
  for (int k = 0; k < 8; ++k) largest = fmaxf(largest, fabsf(x[k / 4].at[k % 4]));
  return largest;
}

template <bool whole, bool half_grad, bool half_param>
__device__ __forceinline__ void update_block(const Entry& e, int64_t block, Numbers a, const Rates& rates,
                                             uint32_t step, const SharedMap* maps) {
  const Adamw8bitTensor& t = e.tensor;
  const int64_t begin = block * kQuantBlock + lane() * 4;
  const float m_scale = t.exp_avg_scale[block] * rates.beta1;
  a.m_scale = m_scale > kLargestScale ? kLargestScale : m_scale;
  a.v_scale = t.exp_avg_sq_scale[block] * rates.beta2;
  PhiloxWords words{};
  if (half_param) {
    const uint64_t group = static_cast<uint64_t>(t.start / 8 + block * kWarp + lane());
    words = philox(rates.seed,
                   {static_cast<uint32_t>(group), static_cast<uint32_t>(group >> 32), t.number, step});
  }
  Loaded<half_grad, half_param> x[2];
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int64_t i = begin + half * (kQuantBlock / 2);
    x[half] = load<whole, half_grad, half_param>(t, i, e.size - i);
  }
  Four<float> m[2], v[2];
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int64_t i = begin + half * (kQuantBlock / 2);
    const Four<float> p = update_four<whole>(x[half], e.size - i, a, rates.eps, maps, &m[half], &v[half]);
    store_params<whole, half_param>(t, i, e.size - i, p, words, 16 * half);
  }
  float m_inverse, v_inverse;
  const float new_m_scale = scale_of(largest_of(m), &m_inverse);
  const float new_v_scale = scale_of(largest_of(v), &v_inverse);
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int64_t i = begin + half * (kQuantBlock / 2);
    Four<uint8_t> m_codes, v_codes;
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      m_codes.at[k] = signed_code(m[half].at[k] * m_inverse, maps[0]);
      v_codes.at[k] = static_cast<uint8_t>(unsigned_place(v[half].at[k] * v_inverse, maps[1]) - 1);
    }
    store_four<whole>(t.exp_avg + i, m_codes, e.size - i);
    store_four<whole>(t.exp_avg_sq + i, v_codes, e.size - i);
  }
  if (lane() == 0) t.exp_avg_scale[block] = new_m_scale, t.exp_avg_sq_scale[block] = new_v_scale;
}

// Blocks begin .. end - 1, a warp each.
template <bool half_grad, bool half_param>
__device__ __forceinline__ void update_range(const Entry& e, int64_t begin, int64_t end, const Numbers& a,
                                             const Rates& rates, uint32_t step, const SharedMap* maps) {
  for (int64_t b = begin + warp(); b < end; b += kWarps) {
    e.aligned&& e.size - b* kQuantBlock >= kQuantBlock
        ? update_block<true, half_grad, half_param>(e, b, a, rates, step, maps)
        : update_block<false, half_grad, half_param>(e, b, a, rates, step, maps);
  }
}

__global__ void __launch_bounds__(kThreads, 3)
    update_blocks(const __grid_constant__ Table table, const __grid_constant__ Maps maps, Rates rates,
                  const AdamControl* control, const AdamFactors* factors) {
  const AdamControl c = *control;
  if (c.skip) return;
  SharedMap* const shared = shared_memory<SharedMap>();
  fill(shared, maps.both_signs, true);
  fill(shared + 1, maps.positive, false);
  __syncthreads();
  const int which = table.find(static_cast<int>(blockIdx.x));
  const Entry& e = table.entries[which];
  const AdamFactors own = factors[e.index];
  const Numbers a = {static_cast<float>(c.factor * rates.mean_factor),
                     static_cast<float>(c.factor * rates.square_root),
                     own.step_size,
                     own.root_factor,
                     static_cast<float>(1.0 - c.lr * e.decay),
                     0.0f,
                     0.0f};
  const int64_t blocks = (e.size + kQuantBlock - 1) / kQuantBlock;
  const int64_t begin = (static_cast<int>(blockIdx.x) - table.first[which]) * kChunkBlocks;
  const int64_t end = blocks - begin < kChunkBlocks ? blocks : begin + kChunkBlocks;
  const Adamw8bitTensor& t = e.tensor;
  if (t.bf16_param) {
    t.bf16_grad ? update_range<true, true>(e, begin, end, a, rates, own.step, shared)
                : update_range<false, true>(e, begin, end, a, rates, own.step, shared);
  } else {
    t.bf16_grad ? update_range<true, false>(e, begin, end, a, rates, own.step, shared)
                : update_range<false, false>(e, begin, end, a, rates, own.step, shared);
  }
}

bool fits_fours(const Adamw8bitTensor& t) {
  const auto fits = [](const void* p, bool half) {
    return half ? cuda::fits_fours(static_cast<const bf16*>(p))
                : cuda::fits_fours(static_cast<const float*>(p));
  };
  return fits(t.param, t.bf16_param) && fits(t.grad, t.bf16_grad) && fits(t.copy, true) &&
         cuda::fits_fours(t.exp_avg) && cuda::fits_fours(t.exp_avg_sq);
}

void step(const Adamw8bitTensor* tensors, const int64_t* sizes, const double* weight_decay, int64_t count,
          uint64_t seed, const AdamStep& a) {
  const auto factor_bytes = count * static_cast<int64_t>(sizeof(AdamFactors));
  const DeviceScratch scratch(static_cast<int64_t>(sizeof(AdamControl)) + factor_bytes);
  auto* const control = scratch.as<AdamControl>();
  auto* const factors = reinterpret_cast<AdamFactors*>(control + 1);
  start_adam_numbers(a, count, control, factors);
  const Rates rates = {static_cast<float>(a.beta1),
                       static_cast<float>(a.beta2),
                       std::max(static_cast<float>(a.eps), kLeastEps),
                       static_cast<float>(1.0 - a.beta1),
                       static_cast<float>(std::sqrt(1.0 - a.beta2)),
                       seed};
  const auto make = [&](int64_t i, Entry* entry) {
    *entry = {tensors[i], weight_decay[i], sizes[i], static_cast<int32_t>(i), fits_fours(tensors[i])};
    constexpr int64_t chunk = kChunkBlocks * kQuantBlock;
    return (sizes[i] + chunk - 1) / chunk;
  };
  const Maps maps = {kSignedMap, kUnsignedMap};
  for_tables<Entry>(count, make, [&](const Table& table, unsigned blocks) {
    launch<&update_blocks>({dim3(blocks), dim3(kThreads), 2 * sizeof(SharedMap)}, table, maps, rates,
                           static_cast<const AdamControl*>(control),
                           static_cast<const AdamFactors*>(factors));
  });
}

}  // namespace

GPTCORE_CUDA_BODIES(Adamw8bitBodies, adamw_8bit_bodies) = {nullptr, step};

}  // namespace gptcore::cuda
