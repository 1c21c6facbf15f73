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
#include "kernels/adamw_8bit/code_cells.h"

namespace gptcore::cuda {
namespace {

constexpr int kThreads = 256, kWarps = kThreads / kWarp;
constexpr int64_t kChunkBlocks = 64;  // of 256 elements, for a block of threads

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
  PhiloxKeys keys;
};

// The root of the least normal number, below which roots are 0: no denominator is.
constexpr float kLeastEps = 1.0842022e-19f;

// Of one block of elements.
struct Numbers {
  float mean_factor, square_root;
  float root_factor, eps;  // of the denominator over the step's size; of no step eps is infinite
  float keep;
  float m_scale, v_scale;
};

// --- the map -----------------------------------------------------------------------------------------------

__device__ constexpr MapTables kTables[2] = {make_tables(1), make_tables(2)};  // of m and of v

// Of 16384 elements a thread block reads 160 KiB and more; the tables, out of the second level of cache, are 23.
__device__ __forceinline__ void fill(MapTables* shared) {
  const auto* const from = reinterpret_cast<const uint4*>(kTables);
  constexpr int count = static_cast<int>(sizeof(kTables) / (sizeof(uint4)));
#pragma unroll
  for (int i = static_cast<int>(threadIdx.x); i < count; i += kThreads)
    reinterpret_cast<uint4*>(shared)[i] = from[i];
}

// The code of a magnitude that has been moved by kCellOffset, in bits 16 .. 23; its sign above.
__device__ __forceinline__ uint32_t coded(float z, const MapTables& map) {
  const uint32_t word = __float_as_uint(z);
  return word + map.entry[(word >> 16 & kCellMask) - kFirstCell];
}

__device__ __forceinline__ uint32_t unsigned_codes(const Four<float>& x, float inverse,
                                                   const MapTables& map) {
  uint32_t sums[4];
#pragma unroll
  for (int k = 0; k < 4; ++k) sums[k] = coded(x.at[k] * inverse + kCellOffset, map);
  return __byte_perm(upper_halves(sums[0], sums[1]), upper_halves(sums[2], sums[3]), 0x6420);
}

// What the table gives, 0 .. 128, is added to 127 or taken from it, byte by byte: no sum leaves its byte. There is no -1.
__device__ __forceinline__ uint32_t signed_codes(const Four<float>& x, float inverse, const MapTables& map) {
  uint32_t sums[4];
#pragma unroll
  for (int k = 0; k < 4; ++k) sums[k] = coded(x.at[k] * inverse + copysignf(kCellOffset, x.at[k]), map);
  const uint32_t first = upper_halves(sums[0], sums[1]), second = upper_halves(sums[2], sums[3]);
  const uint32_t places = __byte_perm(first, second, 0x6420);
  const uint32_t below = places & odd_byte_signs(first, second);
  const uint32_t ones = below & 0x80808080u;
  return 0x7f7f7f7fu + places - 2 * below + (ones >> 7);
}

// The scale of a block, and what its moments are multiplied by.
__device__ __forceinline__ float scale_of(float largest, float* inverse) {
  largest = __uint_as_float(warp_largest(__float_as_uint(largest)));
  const bool some = largest >= kLeastScale;
  // The unit has no reciprocal above 2^126; products may be subnormal.
  *inverse = some ? reciprocal_approximate(largest * 0.25f) * 0.25f : 0.0f;
  return some ? largest : 0.0f;
}

// --- update ------------------------------------------------------------------------------------------------

// p as bf16 in the upper half, up with the odds that its lower half is of the way. Infinities stay; so do NaNs, once there
// is room above them: arithmetic gives those of all bits but the sign, and what is below zero is no larger word.
__device__ __forceinline__ uint32_t round_by(float p, uint32_t random) {
  const auto word = static_cast<int32_t>(__float_as_uint(p));
  return static_cast<uint32_t>(word < 0x7fff0000 ? word : 0x7fff0000) + random;
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
                                                   const Numbers& a, const MapTables* maps, Four<float>* m,
                                                   Four<float>* v) {
  const Four<float> grad = widened(x.grad), before = widened(x.param);
  Four<float> p;
#pragma unroll
  for (int k = 0; k < 4; ++k) {
    const float g = grad.at[k], root = g * a.square_root;
    const float mean = maps[0].value[x.m.at[k]] * a.m_scale + g * a.mean_factor;
    const float square = fminf(maps[1].value[x.v.at[k]] * a.v_scale + root * root, kLargestMoment);
    const float denominator = sqrt_flushed(square) * a.root_factor + a.eps;
    p.at[k] = before.at[k] * a.keep - mean * reciprocal_approximate(denominator);
    m->at[k] = whole || k < n ? mean : 0.0f;
    v->at[k] = whole || k < n ? square : 0.0f;
  }
  return p;
}

// Four bytes.
template <bool whole>
__device__ __forceinline__ void store_codes(uint8_t* p, uint32_t codes, int64_t n) {
  if constexpr (whole) {
    *reinterpret_cast<uint32_t*>(p) = codes;
  } else {
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      if (k < n) p[k] = static_cast<uint8_t>(codes >> 8 * k);
    }
  }
}

__device__ __forceinline__ float largest_of(const Four<float> (&x)[2]) {
  float largest = 0.0f;
#pragma unroll
  for (int k = 0; k < 8; ++k) largest = fmaxf(largest, fabsf(x[k / 4].at[k % 4]));
  return largest;
}

template <bool whole, bool half_grad, bool half_param>
__device__ __forceinline__ void update_block(const Entry& e, int64_t block, Numbers a, const Rates& rates,
                                             uint32_t step, const MapTables* maps) {
  const Adamw8bitTensor& t = e.tensor;
  const int64_t begin = block * kQuantBlock + lane() * 4;
  const float m_scale = t.exp_avg_scale[block] * rates.beta1;
  a.m_scale = m_scale > kLargestScale ? kLargestScale : m_scale;
  a.v_scale = t.exp_avg_sq_scale[block] * rates.beta2;
  PhiloxWords words{};
  if (half_param) {
    const uint64_t group = static_cast<uint64_t>(t.start / 8 + block * kWarp + lane());
    words = philox(rates.keys,
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
    const Four<float> p = update_four<whole>(x[half], e.size - i, a, maps, &m[half], &v[half]);
    store_params<whole, half_param>(t, i, e.size - i, p, words, 16 * half);
  }
  float m_inverse, v_inverse;
  const float new_m_scale = scale_of(largest_of(m), &m_inverse);
  const float new_v_scale = scale_of(largest_of(v), &v_inverse);
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int64_t i = begin + half * (kQuantBlock / 2);
    store_codes<whole>(t.exp_avg + i, signed_codes(m[half], m_inverse, maps[0]), e.size - i);
    store_codes<whole>(t.exp_avg_sq + i, unsigned_codes(v[half], v_inverse, maps[1]), e.size - i);
  }
  if (lane() == 0) t.exp_avg_scale[block] = new_m_scale, t.exp_avg_sq_scale[block] = new_v_scale;
}

// Blocks begin .. end - 1, a warp each.
template <bool half_grad, bool half_param>
__device__ __forceinline__ void update_range(const Entry& e, int64_t begin, int64_t end, const Numbers& a,
                                             const Rates& rates, uint32_t step, const MapTables* maps) {
  for (int64_t b = begin + warp(); b < end; b += kWarps) {
    e.aligned&& e.size - b* kQuantBlock >= kQuantBlock
        ? update_block<true, half_grad, half_param>(e, b, a, rates, step, maps)
        : update_block<false, half_grad, half_param>(e, b, a, rates, step, maps);
  }
}

__global__ void __launch_bounds__(kThreads, 3)
    update_blocks(const __grid_constant__ Table table, Rates rates, const AdamControl* control,
                  const AdamFactors* factors) {
  const AdamControl c = *control;
  if (c.skip) return;
  MapTables* const shared = shared_memory<MapTables>();
  fill(shared);
  __syncthreads();
  const int which = table.find(static_cast<int>(blockIdx.x));
  const Entry& e = table.entries[which];
  const AdamFactors own = factors[e.index];
  const Numbers a = {static_cast<float>(c.factor * rates.mean_factor),
                     static_cast<float>(c.factor * rates.square_root),
                     fminf(own.root_factor / own.step_size, kLargestMoment),
                     rates.eps / own.step_size,
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
                       philox_keys(seed)};
  const auto make = [&](int64_t i, Entry* entry) {
    *entry = {tensors[i], weight_decay[i], sizes[i], static_cast<int32_t>(i), fits_fours(tensors[i])};
    constexpr int64_t chunk = kChunkBlocks * kQuantBlock;
    return (sizes[i] + chunk - 1) / chunk;
  };
  for_tables<Entry>(count, make, [&](const Table& table, unsigned blocks) {
    launch<&update_blocks>({dim3(blocks), dim3(kThreads), sizeof(kTables)}, table, rates,
                           static_cast<const AdamControl*>(control),
                           static_cast<const AdamFactors*>(factors));
  });
}

}  // namespace

GPTCORE_CUDA_BODIES(Adamw8bitBodies, adamw_8bit_bodies) = {nullptr, step};

}  // namespace gptcore::cuda
