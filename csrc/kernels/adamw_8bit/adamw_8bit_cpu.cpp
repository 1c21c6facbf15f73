#include "core/parallel.h"
#include "core/philox.h"
#include "core/simd.h"
#include "kernels/adamw_8bit/adamw_8bit_body.h"
#include "kernels/adamw_8bit/dynamic_map.h"

namespace gptcore {
namespace GPTCORE_ISA_NS {
namespace {

constexpr float kLargest = 3.4e38f;
// Smaller scales have no inverse in f32.
constexpr float kLeastScale = 1e-37f;

// A block between the two passes over it.
struct Moments {
  alignas(64) float exp_avg[kQuantBlock];
  alignas(64) float exp_avg_sq[kQuantBlock];
};

// 16 random bits for each element of a block.
struct Bits {
  alignas(64) uint32_t words[kQuantBlock / 2];
};

void draw(const PhiloxKey& key, int64_t block, int64_t tensor, uint32_t step, Bits* bits) {
  constexpr int64_t groups = kQuantBlock / 8;  // of four words
  for (int64_t g = 0; g < groups; g += kLanes) {
    const uint64_t first = static_cast<uint64_t>(block * groups + g);
    VecU words[4] = {philox_lane() + static_cast<uint32_t>(first),
                     VecU{} + static_cast<uint32_t>(first >> 32), VecU{} + static_cast<uint32_t>(tensor),
                     VecU{} + step};
    philox(key, words);
    transpose_words(words);
    for (int i = 0; i < 4; ++i) {
      __builtin_memcpy(bits->words + 4 * g + i * kLanes, words + i, sizeof(VecU));
    }
  }
}

// p to bf16, up with the odds that its lower half is of the way; NaN stays NaN, infinities stay.
GPTCORE_INLINE void store_rounded(bf16* out, Vec p, const Bits& bits, int64_t i, int64_t n) {
  VecU random;
  __builtin_memcpy(&random, bits.words + i % (kQuantBlock / 2), sizeof(random));
  random = i < kQuantBlock / 2 ? random & 0xffffu : random >> 16;
  const VecU up = ((VecU)p + random) & 0xffff0000u;
  const VecI number = (VecI)abs(p) < 0x7f800000;
  store_some(out, (Vec)(number ? up : (VecU)p), n);
}

// The root of v >= 0 within an ulp: the processor's takes 18 cycles for 16 lanes, an estimate of 14 bits with
// one step of Newton 5, and this kernel computes rather than waits for memory.
GPTCORE_INLINE Vec root_of(Vec v) {
#if defined(__AVX512F__)
  const Vec estimate = (Vec)_mm512_rsqrt14_ps((__m512)at_least(v, 1e-37f));
  const Vec root = v * estimate;
  return root + (0.5f * estimate) * (v - root * root);
#else
  return sqrt(v);
#endif
}

GPTCORE_INLINE Vec larger_magnitude(Vec a, Vec b) {
#if defined(__AVX512F__)
  return (Vec)_mm512_range_ps((__m512)a, (__m512)b,
                              0xb);  // the larger magnitude, without sign
#else
  return max(a, abs(b));
#endif
}

// The codes of a block of `size` and their scale.
template <class Code>
GPTCORE_INLINE float quantise(const float* x, Vec largest, int64_t size, uint8_t* codes, const Code& code) {
  float scale = reduce_max(largest);
  if (!(scale >= kLeastScale)) scale = 0;
  const float inverse = scale > 0 ? 1 / scale : 0;
  for_lanes(size, [&](int64_t i, int64_t n) { store_bytes(codes + i, code(load(x + i) * inverse), n); });
  return scale;
}

template <class G, class P>
void update_block(const Adamw8bitTensor& t, int64_t block, int64_t size, const Adamw8bitNumbers& a,
                  const Bits* bits) {
  const int64_t begin = block * kQuantBlock;
  const G* grad = static_cast<const G*>(t.grad) + begin;
  P* param = static_cast<P*>(t.param) + begin;
  uint8_t *exp_avg = t.exp_avg + begin, *exp_avg_sq = t.exp_avg_sq + begin;
  const float m_scale = t.exp_avg_scale[block] * a.beta1, v_scale = t.exp_avg_sq_scale[block] * a.beta2;
  Moments now;
  Vec largest_m = {}, largest_v = {};
  for_lanes(size, [&](int64_t i, int64_t n) {
    const Vec g = load_some(grad + i, n), root = g * a.square_root;
    const Vec m = signed_value(load_bytes(exp_avg + i, n)) * m_scale + g * a.mean_factor;
    const Vec old_v = unsigned_value(load_bytes(exp_avg_sq + i, n)) * v_scale;
    const Vec v = at_most(old_v + root * root, kLargest);
    const Vec denominator = root_of(v) * a.root_factor + a.eps;
    const Vec p = load_some(param + i, n) * t.keep - (m * a.step_size) * reciprocal(denominator);
    if constexpr (sizeof(P) == 2) {
      store_rounded(param + i, p, *bits, i, n);
    } else {
      store_some(param + i, p, n);
      if (t.copy) store_some(t.copy + begin + i, p, n);
    }
    store(now.exp_avg + i, m);
    store(now.exp_avg_sq + i, v);
    largest_m = larger_magnitude(largest_m, n == kLanes ? m : keep_n(m, n, 0.0f));
    largest_v = larger_magnitude(largest_v, n == kLanes ? v : keep_n(v, n, 0.0f));
  });
  t.exp_avg_scale[block] =
      quantise(now.exp_avg, largest_m, size, exp_avg, [](Vec y) { return signed_code(y); });
  t.exp_avg_sq_scale[block] =
      quantise(now.exp_avg_sq, largest_v, size, exp_avg_sq, [](Vec y) { return unsigned_code(y); });
}

void update(const Adamw8bitTensor* tensors, const Chunk* chunks, int64_t count, const Adamw8bitNumbers& a) {
  const PhiloxKey key = philox_key(a.seed);
  parallel_for(count, [&](int64_t task, int) {
    const Chunk& chunk = chunks[task];
    const Adamw8bitTensor& t = tensors[chunk.tensor];
    Bits bits;
    for (int64_t i = 0; i < chunk.size; i += kQuantBlock) {
      const int64_t block = (chunk.begin + i) / kQuantBlock;
      const int64_t size = chunk.size - i < kQuantBlock ? chunk.size - i : kQuantBlock;
      if (t.bf16_param) {
        draw(key, block, chunk.tensor, a.step, &bits);
        t.bf16_grad ? update_block<bf16, bf16>(t, block, size, a, &bits)
                    : update_block<float, bf16>(t, block, size, a, &bits);
      } else {
        t.bf16_grad ? update_block<bf16, float>(t, block, size, a, nullptr)
                    : update_block<float, float>(t, block, size, a, nullptr);
      }
    }
  });
}

}  // namespace

extern const Adamw8bitBodies adamw_8bit_bodies;
const Adamw8bitBodies adamw_8bit_bodies = {update};

}  // namespace GPTCORE_ISA_NS
}  // namespace gptcore
