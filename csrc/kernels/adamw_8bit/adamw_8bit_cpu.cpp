#include "core/parallel.h"
#include "core/philox.h"
#include "core/prefetch.h"
#include "core/simd.h"
#include "kernels/adamw_8bit/adamw_8bit_body.h"
#include "kernels/adamw_8bit/dynamic_map.h"

namespace gptcore {
namespace GPTCORE_ISA_NS {
namespace {

// A block whose parameters are done and whose moments wait to be encoded.
struct Moments {
  alignas(64) float exp_avg[kQuantBlock];
  alignas(64) float exp_avg_sq[kQuantBlock];
  float exp_avg_inverse, exp_avg_sq_inverse;  // of the scales
  uint8_t *exp_avg_codes, *exp_avg_sq_codes;
};

// 16 random bits for each element of a block.
struct Bits {
  alignas(64) uint32_t words[kQuantBlock / 2];
};

// Of one block, counted from the start of the whole tensor. `inner`: words 1 and 2 of the counters, which all blocks of
// a chunk share.
void draw(const PhiloxKey& key, const PhiloxPair& inner, int64_t block, uint32_t step, Bits* bits) {
  constexpr int64_t lanes = kLanes / 2, sets = 4;
  VecL place, low, high;  // such that shuffles of pairs of words leave counters in order
  for (int64_t lane = 0; lane < lanes; ++lane) {
    place[lane] = static_cast<uint64_t>(lane % 2 * (lanes / 2) + lane / 2);
    low[lane] = static_cast<uint64_t>(lane % 2 ? lanes + lane - 1 : lane);
    high[lane] = low[lane] + 1;
  }
  constexpr int64_t groups = kQuantBlock / 8;  // of four words
  for (int64_t g = 0; g < groups; g += sets * lanes) {
    VecL x[sets][4];
#pragma GCC unroll 4
    for (int64_t set = 0; set < sets; ++set) {
      const VecL group = place + static_cast<uint32_t>(block * groups + g + set * lanes);
      philox_join(philox_outer(key, group, splat_long(step)), inner, x[set]);
    }
    philox_finish<sets>(key, x);
#pragma GCC unroll 4
    for (int64_t set = 0; set < sets; ++set) {
      const VecL front = (VecL)interleave_lower(x[set][0], x[set][1]);
      const VecL back = (VecL)interleave_lower(x[set][2], x[set][3]);
      const VecL words[2] = {__builtin_shuffle(front, back, low), __builtin_shuffle(front, back, high)};
      __builtin_memcpy(bits->words + 4 * (g + set * lanes), words, sizeof(words));
    }
  }
}

// The upper halves of the first n lanes.
GPTCORE_INLINE void store_upper(bf16* out, VecU x, int64_t n) {
#if defined(__AVX512F__)
  const VecH half = (VecH)_mm512_cvtepi32_epi16((__m512i)(x >> 16));
#else
  const VecH half = __builtin_convertvector(x >> 16, VecH);
#endif
  if (n == kLanes) {
    *reinterpret_cast<VecHUnaligned*>(out) = half;
  } else {
    __builtin_memcpy(out, &half, static_cast<size_t>(n) * 2);
  }
}

// p to bf16, up with the odds that its lower half is of the way; NaN stays NaN, infinities stay.
GPTCORE_INLINE void store_rounded(bf16* out, Vec p, const Bits& bits, int64_t i, int64_t n) {
  VecU random;
  __builtin_memcpy(&random, bits.words + i % (kQuantBlock / 2), sizeof(random));
  random = i < kQuantBlock / 2 ? random & 0xffffu : random >> 16;
  store_upper(out, p == p ? (VecU)p + random : (VecU)p, n);
}

GPTCORE_INLINE Vec larger_magnitude(Vec a, Vec b) {
#if defined(__AVX512F__)
  return (Vec)_mm512_range_ps((__m512)a, (__m512)b, 0xb);  // the larger magnitude, without sign
#else
  return max(a, abs(b));
#endif
}

// The scale of a block, and what its moments are multiplied by.
GPTCORE_INLINE float scale_of(Vec largest, float* inverse) {
  const float scale = reduce_max(largest);
  const bool some = scale >= kLeastScale;
  *inverse = some ? 1 / scale : 0;
  return some ? scale : 0;
}

GPTCORE_INLINE void encode_lanes(const Moments& x, int64_t i, int64_t n) {
  store_bytes(x.exp_avg_codes + i, signed_code(load(x.exp_avg + i) * x.exp_avg_inverse), n);
  store_bytes(x.exp_avg_sq_codes + i, unsigned_code(load(x.exp_avg_sq + i) * x.exp_avg_sq_inverse), n);
}

void encode(const Moments& x, int64_t size) {
  for_lanes(size, [&](int64_t i, int64_t n) { encode_lanes(x, i, n); });
}

// Two blocks ahead: memory would rest while a block is computed, for a third of the time.
template <class T>
GPTCORE_INLINE void fetch_blocks_ahead(const T* at) {
  fetch_ahead<2 * kQuantBlock * sizeof(T)>(at);
}

// Updates a block and leaves its moments in `now`, and encodes those of `last` meanwhile: one after the other, neither
// would have enough in flight to hide what it waits for.
template <class G, class P>
GPTCORE_INLINE void update_block(const Adamw8bitTensor& t, int64_t block, int64_t size,
                                 const Adamw8bitNumbers& a, const Bits& bits, Moments* now,
                                 const Moments* last) {
  const int64_t begin = block * kQuantBlock;
  const G* grad = static_cast<const G*>(t.grad) + begin;
  P* param = static_cast<P*>(t.param) + begin;
  bf16* copy = t.copy ? t.copy + begin : nullptr;
  uint8_t *exp_avg = t.exp_avg + begin, *exp_avg_sq = t.exp_avg_sq + begin;
  const float m_scale = t.exp_avg_scale[block] * a.beta1;
  const ScaledMap m_map = scaled(kSignedMap, m_scale > kLargestScale ? kLargestScale : m_scale);
  const ScaledMap v_map = scaled(kUnsignedMap, t.exp_avg_sq_scale[block] * a.beta2);
  const float keep = t.keep;
  Vec largest_m = {}, largest_v = {};
  for_lanes(size, [&](int64_t i, int64_t n) {
    fetch_blocks_ahead(grad + i), fetch_blocks_ahead(param + i);
    if (i % 64 == 0) fetch_blocks_ahead(exp_avg + i), fetch_blocks_ahead(exp_avg_sq + i);
    const Vec g = load_some(grad + i, n), root = g * a.square_root;
    const Vec m = signed_value(load_bytes(exp_avg + i, n), m_map) + g * a.mean_factor;
    const Vec v = at_most(unsigned_value(load_bytes(exp_avg_sq + i, n), v_map) + root * root, kLargestMoment);
    const Vec denominator = sqrt(v) * a.root_factor + a.eps;
    const Vec p = load_some(param + i, n) * keep - (m * a.step_size) * reciprocal(denominator);
    if constexpr (sizeof(P) == 2) {
      store_rounded(param + i, p, bits, i, n);
    } else {
      store_some(param + i, p, n);
      if (copy) store_some(copy + i, p, n);
    }
    store(now->exp_avg + i, m);
    store(now->exp_avg_sq + i, v);
    largest_m = larger_magnitude(largest_m, n == kLanes ? m : keep_n(m, n, 0.0f));
    largest_v = max(largest_v, n == kLanes ? v : keep_n(v, n, 0.0f));
    if (last) encode_lanes(*last, i, kLanes);
  });
  t.exp_avg_scale[block] = scale_of(largest_m, &now->exp_avg_inverse);
  t.exp_avg_sq_scale[block] = scale_of(largest_v, &now->exp_avg_sq_inverse);
  now->exp_avg_codes = exp_avg;
  now->exp_avg_sq_codes = exp_avg_sq;
}

template <class G, class P>
void update_chunk(const Adamw8bitTensor& t, const Chunk& chunk, const Adamw8bitNumbers& numbers,
                  const PhiloxKey& key) {
  const Adamw8bitNumbers a = numbers;  // beside t it would be read again after every store
  const uint64_t group = static_cast<uint64_t>((t.start + chunk.begin) / 8);  // of words of random bits
  const PhiloxPair inner = philox_inner(key, splat_long(group >> 32), splat_long(t.number));
  const int64_t before = t.start / kQuantBlock;
  Bits bits;
  Moments moments[2];
  const auto update = [&](int64_t offset, int64_t size, Moments* now, const Moments* last)
                          __attribute__((always_inline)) {
                            const int64_t block = (chunk.begin + offset) / kQuantBlock;
                            if constexpr (sizeof(P) == 2) draw(key, inner, before + block, a.step, &bits);
                            update_block<G, P>(t, block, size, a, bits, now, last);
                          };
  const int64_t whole = chunk.size / kQuantBlock * kQuantBlock;
  if (whole > 0) {
    update(0, kQuantBlock, moments, nullptr);
    Moments *last = moments, *now = moments + 1;
    for (int64_t offset = kQuantBlock; offset < whole; offset += kQuantBlock) {
      update(offset, kQuantBlock, now, last);
      Moments* const done = now;
      now = last, last = done;
    }
    encode(*last, kQuantBlock);
  }
  if (whole < chunk.size) {
    update(whole, chunk.size - whole, moments, nullptr);
    encode(moments[0], chunk.size - whole);
  }
}

void update(const Adamw8bitTensor* tensors, const Chunk* chunks, int64_t count, const Adamw8bitNumbers& a) {
  const PhiloxKey key = philox_key(a.seed);
  parallel_for(count, [&](int64_t task, int) {
    const Chunk& chunk = chunks[task];
    const Adamw8bitTensor& t = tensors[chunk.tensor];
    if (t.bf16_param) {
      t.bf16_grad ? update_chunk<bf16, bf16>(t, chunk, a, key) : update_chunk<float, bf16>(t, chunk, a, key);
    } else {
      t.bf16_grad ? update_chunk<bf16, float>(t, chunk, a, key)
                  : update_chunk<float, float>(t, chunk, a, key);
    }
  });
}

}  // namespace

extern const Adamw8bitBodies adamw_8bit_bodies;
const Adamw8bitBodies adamw_8bit_bodies = {update, nullptr};

}  // namespace GPTCORE_ISA_NS
}  // namespace gptcore
