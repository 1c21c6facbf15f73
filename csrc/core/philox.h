// Philox4x32-10: 128 random bits as a function of a counter of four 32-bit words and a key of two (Salmon, Moraes,
// Dror and Shaw 2011, "Parallel random numbers: as easy as 1, 2, 3"). No state: whoever knows the place of a number
// can make it again, on any thread, instruction set or device.
//
// A round takes the full products of words 0 and 2. Vectors hold the words in 64-bit lanes, the even counters in one
// set and the odd in another: one multiplication gives both halves of a product, and what the upper halves carry from
// round to round is never read.
#pragma once

#include <cstdint>

#include "core/simd.h"

namespace gptcore {
namespace GPTCORE_ISA_NS {

constexpr int kPhiloxRounds = 10;
constexpr uint32_t kPhiloxMultiplier0 = 0xd2511f53u, kPhiloxMultiplier1 = 0xcd9e8d57u;

// The key of every round: a Weyl sequence by the golden ratio and by sqrt(3) - 1. 64 bits wide to be broadcast.
struct PhiloxKey {
  uint64_t first[kPhiloxRounds], second[kPhiloxRounds];
};

GPTCORE_INLINE PhiloxKey philox_key(uint64_t seed) {
  PhiloxKey key;
  uint32_t first = static_cast<uint32_t>(seed), second = static_cast<uint32_t>(seed >> 32);
  for (int round = 0; round < kPhiloxRounds; ++round, first += 0x9e3779b9u, second += 0xbb67ae85u)
    key.first[round] = first, key.second[round] = second;
  return key;
}

// Four words of counter to four words of random bits, in place.
GPTCORE_INLINE void philox(const PhiloxKey& key, uint32_t* words) {
  for (int round = 0; round < kPhiloxRounds; ++round) {
    const uint64_t p = uint64_t{kPhiloxMultiplier0} * words[0], q = uint64_t{kPhiloxMultiplier1} * words[2];
    words[0] = static_cast<uint32_t>(q >> 32) ^ words[1] ^ static_cast<uint32_t>(key.first[round]);
    words[2] = static_cast<uint32_t>(p >> 32) ^ words[3] ^ static_cast<uint32_t>(key.second[round]);
    words[1] = static_cast<uint32_t>(q), words[3] = static_cast<uint32_t>(p);
  }
}

typedef uint64_t VecL __attribute__((vector_size(kLanes * 4)));

GPTCORE_INLINE VecL splat_long(uint64_t x) { return x - VecL{}; }

// Products of the lower halves of 64-bit lanes.
GPTCORE_INLINE VecL multiply_lower(VecL a, VecL b) {
#if defined(__AVX512F__)
  return (VecL)_mm512_mul_epu32((__m512i)a, (__m512i)b);
#elif defined(__AVX2__)
  return (VecL)_mm256_mul_epu32((__m256i)a, (__m256i)b);
#elif defined(__SSE2__)
  return (VecL)_mm_mul_epu32((__m128i)a, (__m128i)b);
#else
  return (a & 0xffffffffu) * (b & 0xffffffffu);
#endif
}

GPTCORE_INLINE VecL exclusive_or(VecL a, VecL b, VecL c) {
#if defined(__AVX512F__)
  return (VecL)_mm512_ternarylogic_epi64((__m512i)a, (__m512i)b, (__m512i)c, 0x96);
#else
  return a ^ b ^ c;
#endif
}

// The upper halves brought down; what is left above does not count. With AVX-512 a shuffle, since shifts and these
// products share one port and shuffles have another: 1.5 times as fast.
GPTCORE_INLINE VecL upper_half(VecL x) {
#if defined(__AVX512F__)
  return (VecL)_mm512_shuffle_epi32((__m512i)x, _MM_PERM_DDBB);
#else
  return x >> 32;
#endif
}

// The lower halves of even and odd lanes side by side.
GPTCORE_INLINE VecU interleave_lower(VecL even, VecL odd) {
#if defined(__AVX512F__)
  return (VecU)_mm512_mask_shuffle_epi32((__m512i)even, 0xaaaa, (__m512i)odd, _MM_PERM_CCAA);
#else
  return (VecU)((even & 0xffffffffu) | (odd << 32));
#endif
}

GPTCORE_INLINE void philox_round(const PhiloxKey& key, int round, VecL* x) {
  const VecL p = multiply_lower(x[0], splat_long(kPhiloxMultiplier0));
  const VecL q = multiply_lower(x[2], splat_long(kPhiloxMultiplier1));
  x[0] = exclusive_or(upper_half(q), x[1], splat_long(key.first[round]));
  x[2] = exclusive_or(upper_half(p), x[3], splat_long(key.second[round]));
  x[1] = q, x[3] = p;
}

// For two rounds words 0 and 3 of a counter (the outer) and words 1 and 2 (the inner) go separate ways: what each pair
// becomes can be kept for all counters that share it, and a counter then takes eight rounds.
struct PhiloxPair {
  VecL first, third, kept;
};

GPTCORE_INLINE PhiloxPair philox_outer(const PhiloxKey& key, VecL word0, VecL word3) {
  const VecL p = multiply_lower(word0, splat_long(kPhiloxMultiplier0));
  const VecL x = exclusive_or(upper_half(p), word3, splat_long(key.second[0]));
  const VecL q = multiply_lower(x, splat_long(kPhiloxMultiplier1));
  return {upper_half(q), p ^ splat_long(key.second[1]), q};
}

GPTCORE_INLINE PhiloxPair philox_inner(const PhiloxKey& key, VecL word1, VecL word2) {
  const VecL q = multiply_lower(word2, splat_long(kPhiloxMultiplier1));
  const VecL x = exclusive_or(upper_half(q), word1, splat_long(key.first[0]));
  const VecL p = multiply_lower(x, splat_long(kPhiloxMultiplier0));
  return {q ^ splat_long(key.first[1]), upper_half(p), p};
}

GPTCORE_INLINE void philox_join(const PhiloxPair& outer, const PhiloxPair& inner, VecL* x) {
  x[0] = outer.first ^ inner.first, x[1] = outer.kept, x[2] = outer.third ^ inner.third, x[3] = inner.kept;
}

// The other eight rounds of kSets sets of counters. A round waits 7 cycles for its products and needs 3 of the two
// ports: four sets in flight keep them busy.
template <int kSets>
GPTCORE_INLINE void philox_finish(const PhiloxKey& key, VecL (*x)[4]) {
#pragma GCC unroll 8
  for (int round = 2; round < kPhiloxRounds; ++round) {
#pragma GCC unroll 4
    for (int set = 0; set < kSets; ++set) philox_round(key, round, x[set]);
  }
}

// Two sets, of even and odd counters, to words by counter.
GPTCORE_INLINE void philox_words(const VecL (*x)[4], VecU* words) {
#pragma GCC unroll 4
  for (int w = 0; w < 4; ++w) words[w] = interleave_lower(x[0][w], x[1][w]);
}

// The same for kLanes counters: lane i of words[w] is word w of counter i.
GPTCORE_INLINE void philox(const PhiloxKey& key, VecU* words) {
  VecL even[4], odd[4], x[2][4];
#pragma GCC unroll 4
  for (int w = 0; w < 4; ++w) even[w] = (VecL)words[w], odd[w] = even[w] >> 32;
  philox_join(philox_outer(key, even[0], even[3]), philox_inner(key, even[1], even[2]), x[0]);
  philox_join(philox_outer(key, odd[0], odd[3]), philox_inner(key, odd[1], odd[2]), x[1]);
  philox_finish<2>(key, x);
  philox_words(x, words);
}

// Between words by lane and words in memory order: vector i then holds all four words of counters
// [i kLanes / 4, (i + 1) kLanes / 4), where lane l stood for counter philox_lane(l). Its own inverse.
GPTCORE_INLINE void transpose_words(VecU* words) {
  VecI low, high, left, right;
  for (int lane = 0; lane < kLanes; ++lane) {
    const int block = lane & ~3, place = lane & 3;
    low[lane] = block + place / 2 + place % 2 * kLanes;
    high[lane] = low[lane] + 2;
    left[lane] = block + place % 2 + place / 2 * kLanes;
    right[lane] = left[lane] + 2;
  }
  const VecU a = __builtin_shuffle(words[0], words[1], low), b = __builtin_shuffle(words[2], words[3], low);
  const VecU c = __builtin_shuffle(words[0], words[1], high), d = __builtin_shuffle(words[2], words[3], high);
  words[0] = __builtin_shuffle(a, b, left), words[1] = __builtin_shuffle(a, b, right);
  words[2] = __builtin_shuffle(c, d, left), words[3] = __builtin_shuffle(c, d, right);
}

// Which of kLanes successive counters each lane stands for, so that transpose_words leaves them in order.
GPTCORE_INLINE VecU philox_lane() {
  VecU index = {};
  for (int lane = 0; lane < kLanes; ++lane) index[lane] = lane % 4 * (kLanes / 4) + lane / 4;
  return index;
}

}  // namespace GPTCORE_ISA_NS
}  // namespace gptcore
