// What the passes are built from, per kind of arithmetic: units and products, how probabilities are stored,
// and block sizes.
#pragma once

#include "kernels/attention/pack.h"
#include "kernels/attention/product.h"

namespace gptcore {
namespace GPTCORE_ISA_NS {
namespace {

// f32 throughout; bf16 tensors are widened when packed.
struct F32Engine {
  using Units = F32Units;
  using Score = float;
  struct Scope {};  // nothing to set up on a thread
  static constexpr bool kFine = true;
  static constexpr int kRowStep = kProductRows, kKeyStep = 16;
  static constexpr int kForwardRows = 32, kForwardKeys = 256;
  static constexpr int kBackwardRows = 64, kBackwardKeys = 128, kStrip = 32;

  static void product(const float* a, int64_t a_row, const Panels<float>& b, float* c, int64_t c_row,
                      int64_t rows, int64_t columns, int64_t depth, bool accumulate) {
    vector_product<Units>(a, a_row, b, c, c_row, rows, columns, depth, accumulate);
  }
  static __attribute__((always_inline)) inline void store_two(float* p, Vec x, Vec y) {
    store(p, x);
    store(p + kLanes, y);
  }
  // Two rows of keys of a strip, one vector of query columns. `rows` has one row per key, `units` the operand
  // that sums over keys: here they are the same layout.
  static __attribute__((always_inline)) inline void store_rows(float* row0, float* row1, int64_t column,
                                                               Vec x, Vec y) {
    store(row0 + column, x);
    store(row1 + column, y);
  }
};

#if defined(__AVX512BF16__)
// Pairs of bf16: probabilities and score gradients are rounded to bf16, sums are f32.
struct PairEngine {
  using Units = PairUnits;
  using Score = bf16;
  struct Scope {};
  static constexpr bool kFine = false;
  static constexpr int kRowStep = kProductRows, kKeyStep = 32;
  static constexpr int kForwardRows = 32, kForwardKeys = 256;
  static constexpr int kBackwardRows = 64, kBackwardKeys = 128, kStrip = 32;

  static void product(const uint32_t* a, int64_t a_row, const Panels<uint32_t>& b, float* c, int64_t c_row,
                      int64_t rows, int64_t columns, int64_t depth, bool accumulate) {
    vector_product<Units>(a, a_row, b, c, c_row, rows, columns, depth, accumulate);
  }
  static __attribute__((always_inline)) inline void store_two(bf16* p, Vec x, Vec y) {
    _mm512_storeu_si512(p, (__m512i)_mm512_cvtne2ps_pbh((__m512)y, (__m512)x));
  }
  static __attribute__((always_inline)) inline void store_rows(bf16* row0, bf16* row1, int64_t column, Vec x,
                                                               Vec y) {
    const __m512i both = (__m512i)_mm512_cvtne2ps_pbh((__m512)y, (__m512)x);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(row0 + column), _mm512_castsi512_si256(both));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(row1 + column), _mm512_extracti64x4_epi64(both, 1));
  }
  // The same, and the two rows joined to pairs in `units`.
  static __attribute__((always_inline)) inline void store_both(bf16* row0, bf16* row1, uint32_t* units,
                                                               int64_t column, Vec x, Vec y) {
    const __m512i both = (__m512i)_mm512_cvtne2ps_pbh((__m512)y, (__m512)x);
    const __m256i low = _mm512_castsi512_si256(both), high = _mm512_extracti64x4_epi64(both, 1);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(row0 + column), low);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(row1 + column), high);
    const __m512i pairs =
        _mm512_or_si512(_mm512_cvtepu16_epi32(low), _mm512_slli_epi32(_mm512_cvtepu16_epi32(high), 16));
    _mm512_storeu_si512(units + column, pairs);
  }
};
#endif

}  // namespace
}  // namespace GPTCORE_ISA_NS
}  // namespace gptcore
