// Dropout on probabilities. Whether query t of a head keeps key s depends on its place alone: 16 of the bits that
// Philox gives for the counter (s / 8, t, batch H + head, offset), those at 16 (s mod 8), below `keep`. So forward and
// backward, whatever their blocks, and any device agree without storing a mask.
//
// Both passes apply it as a pass of its own over a block of scores that lies in cache, which leaves every loop without
// dropout as it was: the random bits cost far more (15 instructions for 16 scores on AVX-512) than loading them again.
#pragma once

#include "core/philox.h"
#include "kernels/attention/mask_range.h"

namespace gptcore {
namespace GPTCORE_ISA_NS {
namespace {

class Dropout {
 public:
  Dropout(const AttentionProblem& p, const Sequence& s)
      : keep_(p.keep), group_(s.group), head_(s.index * p.heads + s.kv_head * s.group), offset_(p.offset) {
    if (active()) key_ = philox_key(p.seed);
  }

  bool active() const { return keep_ < kKeepAll; }
  int32_t token_of(int64_t row) const { return static_cast<int32_t>(group_ == 1 ? row : row / group_); }
  int32_t head_of(int64_t row) const {
    return static_cast<int32_t>(group_ == 1 ? head_ : head_ + row % group_);
  }

  // Forward: zeroes what row `row` drops of columns [columns.begin, columns.end), which stand for keys base +
  // column; both ends of the range are multiples of 16, and so is base.
  template <class Score>
  __attribute__((noinline)) void drop(int64_t row, int64_t base, Range columns, Score* p) const {
    const VecU token = splat_unsigned(token_of(row)), head = splat_unsigned(head_of(row));
    for (int64_t at = columns.begin; at < columns.end; at += 8 * kLanes) {
      VecU words[4] = {philox_lane() + splat_unsigned((base + at) / 8), token, head, splat_unsigned(offset_)};
      philox(key_, words);
      transpose_words(words);
      for (int i = 0; i < 4; ++i) {
        const int64_t first = at + 2 * kLanes * i;
        if (first < columns.end) drop_some(words[i], p + first, columns.end - first);
      }
    }
  }

  // Backward, keys by rows: for kKeys keys from `key` on and columns `rows` of a block whose tokens and heads are
  // given, leaves the bits of keys 2 i and 2 i + 1 in line i of `bits`, and of gradients with respect to dropped
  // probabilities those with respect to the probabilities.
  template <int kKeys>
  __attribute__((noinline)) void drop_gradients(int64_t key, Range rows, const int32_t* tokens,
                                                const int32_t* heads, float scale, float* gradients,
                                                uint32_t* bits, int64_t line) const {
    for (int64_t k = 0; k < kKeys; k += 8) {
      for (int64_t r = rows.begin; r < rows.end; r += kLanes) {
        VecU words[4] = {splat_unsigned((key + k) / 8), load_words(tokens + r), load_words(heads + r),
                         splat_unsigned(offset_)};
        philox(key_, words);
        for (int w = 0; w < 4; ++w) {
          float* g = gradients + (k + 2 * w) * line + r;
          store_words(bits + (k / 2 + w) * line + r, words[w]);
          store(g, kept_first(words[w]) ? load(g) * scale : Vec{});
          store(g + line, kept_second(words[w]) ? load(g + line) * scale : Vec{});
        }
      }
    }
  }

  // Zeroes what is dropped by the bits of drop_gradients; lines of probabilities lie `row` of their elements apart.
  template <int kKeys, class Score>
  __attribute__((noinline)) void drop_transposed(Range rows, const uint32_t* bits, int64_t line, Score* p,
                                                 int64_t p_line) const {
    for (int64_t k = 0; k < kKeys; k += 2, bits += line, p += 2 * p_line) {
      for (int64_t r = rows.begin; r < rows.end; r += kLanes) {
        const VecU words = load_words(bits + r);
        store(p + r, kept_first(words) ? load(p + r) : Vec{});
        store(p + p_line + r, kept_second(words) ? load(p + p_line + r) : Vec{});
      }
    }
  }

 private:
  static VecU splat_unsigned(int64_t x) { return (VecU)splat_int(static_cast<int32_t>(x)); }
  static VecU load_words(const void* p) { return (VecU)load(static_cast<const float*>(p)); }
  static void store_words(uint32_t* p, VecU x) { store(reinterpret_cast<float*>(p), (Vec)x); }

  VecI kept_first(VecU words) const { return words << 16 < splat_unsigned(int64_t{keep_} << 16); }
  VecI kept_second(VecU words) const { return words < splat_unsigned(int64_t{keep_} << 16); }

  // 2 kLanes columns by their bits, of which `left`, a multiple of 16, exist.
  void drop_some(VecU bits, float* p, int64_t left) const {
#if defined(__AVX512F__)
    const __mmask32 dropped =
        _mm512_cmpge_epu16_mask((__m512i)bits, _mm512_set1_epi16(static_cast<int16_t>(keep_)));
    _mm512_mask_storeu_ps(p, static_cast<__mmask16>(dropped), _mm512_setzero_ps());
    if (left > kLanes)
      _mm512_mask_storeu_ps(p + kLanes, static_cast<__mmask16>(dropped >> 16), _mm512_setzero_ps());
#else
    VecH half[2];
    __builtin_memcpy(half, &bits, sizeof half);
    for (int i = 0; i < 2 && i * kLanes < left; ++i, p += kLanes)
      store(p, zero_extend(half[i]) < splat_unsigned(keep_) ? load(p) : Vec{});
#endif
  }
#if defined(__AVX512BF16__)
  void drop_some(VecU bits, bf16* p, int64_t) const {
    const __mmask32 dropped =
        _mm512_cmpge_epu16_mask((__m512i)bits, _mm512_set1_epi16(static_cast<int16_t>(keep_)));
    _mm512_mask_storeu_epi16(p, dropped, _mm512_setzero_si512());
  }
#endif

  PhiloxKey key_;
  int32_t keep_;
  int64_t group_, head_;
  uint32_t offset_;
};

}  // namespace
}  // namespace GPTCORE_ISA_NS
}  // namespace gptcore
