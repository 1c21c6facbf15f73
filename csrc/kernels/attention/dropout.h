// Dropout on probabilities. Whether query t of a head keeps key s depends on its place alone: 16 of the bits that
// Philox gives for the counter (s / 8, t, batch H + head, offset), those at 16 (s mod 8), below `keep`. So
// forward and backward, whatever their blocks, and any device agree without storing a mask.
//
// Both passes apply it as a pass of its own over a block of scores that lies in cache, which leaves every loop
// without dropout as it was: drawing the bits costs far more than loading the scores again. Two of Philox's
// rounds are done once for each key and each row, and kept.
#pragma once

#include "core/arena.h"
#include "core/philox.h"
#include "kernels/attention/mask_range.h"

namespace gptcore {
namespace GPTCORE_ISA_NS {
namespace {

class Dropout {
 public:
  // Makes room for what is kept of `groups` times kLanes counters.
  Dropout(const AttentionProblem& p, const Sequence& s, int64_t groups)
      : s_(s),
        keep_(p.keep),
        heads_(s.index * p.heads),
        offset_(p.offset),
        kept_(static_cast<size_t>(active() ? 2 * groups : 0) * sizeof(PhiloxPair)) {
    if (active()) key_ = philox_key(p.seed);
  }

  bool active() const { return keep_ < kKeepAll; }

 protected:
  static VecU splat_unsigned(int64_t x) { return (VecU)splat_int(static_cast<int32_t>(x)); }

  int32_t token_of(int64_t row) const { return static_cast<int32_t>(s_.token_of(row)); }
  int32_t head_of(int64_t row) const { return static_cast<int32_t>(heads_ + s_.head_of(row)); }
  // Of even and of odd counters.
  PhiloxPair* kept(int64_t group) const { return kept_.as<PhiloxPair>() + 2 * group; }

  // The words of two times kLanes counters; the pairs are those of even and odd counters.
  void draw(const PhiloxPair* outer0, const PhiloxPair* inner0, const PhiloxPair* outer1,
            const PhiloxPair* inner1, VecU* words0, VecU* words1) const {
    VecL x[4][4];
    philox_join(outer0[0], inner0[0], x[0]), philox_join(outer0[1], inner0[1], x[1]);
    philox_join(outer1[0], inner1[0], x[2]), philox_join(outer1[1], inner1[1], x[3]);
    if constexpr (kLanes == 16) {
      philox_finish<4>(key_, x);
    } else {  // 16 registers hold the words of two sets
      philox_finish<2>(key_, x);
      philox_finish<2>(key_, x + 2);
    }
    philox_words(x, words0), philox_words(x + 2, words1);
  }

  const Sequence& s_;
  PhiloxKey key_;
  const int32_t keep_;
  const int64_t heads_;
  const uint32_t offset_;
  const Scratch kept_;
};

// Forward: lanes are keys, eight to each counter.
class KeyDropout : public Dropout {
 public:
  KeyDropout(const AttentionProblem& p, const Sequence& s) : Dropout(p, s, (s.keys + kGroup - 1) / kGroup) {
    if (!active()) return;
    for (int64_t group = 0; group * kGroup < s.keys; ++group) {
      const VecL even = (VecL)(philox_lane() + splat_unsigned(group * kLanes));
      kept(group)[0] = philox_outer(key_, even, splat_long(offset_));
      kept(group)[1] = philox_outer(key_, even >> 32, splat_long(offset_));
    }
  }

  // Zeroes what two rows drop of the keys `keys`; column 0 of p0 and p1 stands for key `base`. Both ends of the
  // range are multiples of 16; what lies up to 16 columns before it may become zero too.
  template <class Score>
  __attribute__((noinline)) void drop(int64_t row0, int64_t row1, Range keys, int64_t base, Score* p0,
                                      Score* p1) const {
    const PhiloxPair inner0 = inner_of(row0), inner1 = inner_of(row1);
    const PhiloxPair both0[2] = {inner0, inner0}, both1[2] = {inner1, inner1};
    for (int64_t at = round_down(keys.begin, kGroup); at < keys.end; at += kGroup) {
      const PhiloxPair* outer = kept(at / kGroup);
      VecU words0[4], words1[4];
      draw(outer, both0, outer, both1, words0, words1);
      transpose_words(words0), transpose_words(words1);
#pragma GCC unroll 4
      for (int i = 0; i < 4; ++i) {
        const int64_t first = at + 2 * kLanes * i;
        if (first + 2 * kLanes <= keys.begin || first >= keys.end) continue;
        drop_some(words0[i], p0 + (first - base), keys.end - first);
        drop_some(words1[i], p1 + (first - base), keys.end - first);
      }
    }
  }

 private:
  static constexpr int64_t kGroup = 8 * kLanes;

  PhiloxPair inner_of(int64_t row) const {
    return philox_inner(key_, (VecL)splat_unsigned(token_of(row)), (VecL)splat_unsigned(head_of(row)));
  }

  // 2 kLanes columns by their bits, of which `left`, a multiple of 16, exist.
  void drop_some(VecU bits, float* p, int64_t left) const {
#if defined(__AVX512F__)
    const __mmask32 dropped = dropped_of(bits);
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
#if defined(__AVX512F__)
  __mmask32 dropped_of(VecU bits) const {
    return _mm512_cmpge_epu16_mask((__m512i)bits, _mm512_set1_epi16(static_cast<int16_t>(keep_)));
  }
#endif
#if defined(__AVX512BF16__)
  void drop_some(VecU bits, bf16* p, int64_t) const {
    _mm512_mask_storeu_epi16(p, dropped_of(bits), _mm512_setzero_si512());
  }
#endif
};

// Backward: keys by rows, so lanes are rows.
class RowDropout : public Dropout {
 public:
  // rows: how many are padded to, a multiple of kLanes.
  RowDropout(const AttentionProblem& p, const Sequence& s, int64_t rows) : Dropout(p, s, rows / kLanes) {
    if (!active()) return;
    for (int64_t group = 0; group < rows / kLanes; ++group) {
      VecU tokens, heads;
      for (int i = 0; i < kLanes; ++i) {
        tokens[i] = static_cast<uint32_t>(token_of(group * kLanes + i));
        heads[i] = static_cast<uint32_t>(head_of(group * kLanes + i));
      }
      kept(group)[0] = philox_inner(key_, (VecL)tokens, (VecL)heads);
      kept(group)[1] = philox_inner(key_, (VecL)tokens >> 32, (VecL)heads >> 32);
    }
  }

  // For kKeys keys from `key` on and the columns `rows` of a block that begins at row `first`: leaves the bits of
  // keys 2 i and 2 i + 1 in line i of `bits`, and of gradients with respect to dropped probabilities those with
  // respect to the probabilities.
  template <int kKeys>
  __attribute__((noinline)) void drop_gradients(int64_t key, int64_t first, Range rows, float scale,
                                                float* gradients, uint32_t* bits, int64_t line) const {
    static_assert(kKeys % 16 == 0);
    for (int64_t k = 0; k < kKeys; k += 16) {
      const PhiloxPair outer0 = outer_of(key + k), outer1 = outer_of(key + k + 8);
      const PhiloxPair both0[2] = {outer0, outer0}, both1[2] = {outer1, outer1};
      for (int64_t r = rows.begin; r < rows.end; r += kLanes) {
        const PhiloxPair* inner = kept((first + r) / kLanes);
        VecU words[8];
        draw(both0, inner, both1, inner, words, words + 4);
#pragma GCC unroll 8
        for (int w = 0; w < 8; ++w) {
          float* g = gradients + (k + 2 * w) * line + r;
          store(reinterpret_cast<float*>(bits + (k / 2 + w) * line + r), (Vec)words[w]);
          store(g, kept_first(words[w]) ? load(g) * scale : Vec{});
          store(g + line, kept_second(words[w]) ? load(g + line) * scale : Vec{});
        }
      }
    }
  }

  // Zeroes what is dropped by the bits of drop_gradients; lines of probabilities lie `p_line` apart.
  template <int kKeys, class Score>
  __attribute__((noinline)) void drop_probabilities(Range rows, const uint32_t* bits, int64_t line, Score* p,
                                                    int64_t p_line) const {
    for (int64_t k = 0; k < kKeys; k += 2, bits += line, p += 2 * p_line) {
      for (int64_t r = rows.begin; r < rows.end; r += kLanes) {
        const VecU words = (VecU)load(reinterpret_cast<const float*>(bits + r));
        drop_lanes(words << 16, p + r);
        drop_lanes(words, p + p_line + r);
      }
    }
  }

 private:
  PhiloxPair outer_of(int64_t key) const {
    return philox_outer(key_, (VecL)splat_unsigned(key / 8), splat_long(offset_));
  }

  // Zeroes the lanes of p whose upper 16 bits of `words` are not below `keep`.
#if defined(__AVX512F__)
  __mmask16 dropped_of(VecU words) const {
    return _mm512_cmpge_epu32_mask((__m512i)words, (__m512i)splat_unsigned(int64_t{keep_} << 16));
  }
  void drop_lanes(VecU words, float* p) const {
    _mm512_mask_storeu_ps(p, dropped_of(words), _mm512_setzero_ps());
  }
  void drop_lanes(VecU words, bf16* p) const {
    _mm256_mask_storeu_epi16(p, dropped_of(words), _mm256_setzero_si256());
  }
#else
  void drop_lanes(VecU words, float* p) const { store(p, kept_second(words) ? load(p) : Vec{}); }
#endif

  VecI kept_first(VecU words) const { return words << 16 < splat_unsigned(int64_t{keep_} << 16); }
  VecI kept_second(VecU words) const { return words < splat_unsigned(int64_t{keep_} << 16); }
};

}  // namespace
}  // namespace GPTCORE_ISA_NS
}  // namespace gptcore
