// Packing of strided tensor rows into the operands of product.h. Rows and depth beyond the tensor become
// zeros, so that products need no tails.
//
//   pack_rows     A, row-major:       out[r][u]           = unit u of row r's depth
//   pack_columns  B, panels of rows:  out[r / L][u][r % L] = unit u of row r's depth         (X transposed)
//   pack_pairs    B, panels of depth: out[d / L][k][d % L] = unit k of the rows, at depth d  (X itself)
//   pack_transposed  A, row-major:    out[d][k]            = unit k of the rows, at depth d
#pragma once

#include <cstdint>

#include "core/simd.h"
#include "kernels/attention/mask_range.h"
#include "kernels/attention/product.h"

namespace gptcore {
namespace GPTCORE_ISA_NS {
namespace {

// Transposes a kLanes x kLanes block: each round interleaves row i with row i + kLanes / 2, which rotates the
// bits of the combined index; after log2(kLanes) rounds row and column have changed places.
GPTCORE_INLINE void transpose(Vec* rows) {
  VecI low, high;
  for (int i = 0; i < kLanes / 2; ++i) {
    low[2 * i] = i, low[2 * i + 1] = i + kLanes;
    high[2 * i] = i + kLanes / 2, high[2 * i + 1] = i + kLanes / 2 + kLanes;
  }
  Vec next[kLanes];
#pragma GCC unroll 4
  for (int round = 1; round < kLanes; round *= 2) {
#pragma GCC unroll 16
    for (int i = 0; i < kLanes / 2; ++i) {
      next[2 * i] = __builtin_shuffle(rows[i], rows[i + kLanes / 2], low);
      next[2 * i + 1] = __builtin_shuffle(rows[i], rows[i + kLanes / 2], high);
    }
#pragma GCC unroll 16
    for (int i = 0; i < kLanes; ++i) rows[i] = next[i];
  }
}

// A kLanes x kLanes block of f32 from one place to another, transposed.
GPTCORE_INLINE void transpose_block(const float* from, int64_t from_row, float* to, int64_t to_row) {
  Vec block[kLanes];
#pragma GCC unroll 16
  for (int i = 0; i < kLanes; ++i) block[i] = load(from + i * from_row);
  transpose(block);
#pragma GCC unroll 16
  for (int i = 0; i < kLanes; ++i) store(to + i * to_row, block[i]);
}

GPTCORE_INLINE int64_t lanes_left(int64_t size, int64_t offset) {
  return at_most(at_least(size - offset, 0), kLanes);
}

// How each kind of unit is read from a tensor's rows.
template <class Units, class T>
struct Reader;

template <class T>
struct Reader<F32Units, T> {
  // Units [unit, unit + kLanes) of a row of `size` values.
  static __attribute__((always_inline)) inline Vec depth(const T* row, int64_t unit, int64_t size) {
    return load_some(row + unit, lanes_left(size, unit));
  }
  // Unit k of rows [0, count) at depths [d, d + kLanes).
  template <class Rows>
  static __attribute__((always_inline)) inline Vec pair(const Rows& rows, int64_t first, int64_t k,
                                                        int64_t count, int64_t d, int64_t size) {
    return k < count ? load_some(rows(first + k) + d, lanes_left(size, d)) : Vec{};
  }
  static __attribute__((always_inline)) inline Vec negate(Vec x) { return -x; }
};

#if defined(__AVX512BF16__)
template <>
struct Reader<PairUnits, bf16> {
  static __attribute__((always_inline)) inline Vec depth(const bf16* row, int64_t unit, int64_t size) {
    const int64_t n = at_most(at_least(size - 2 * unit, 0), 2 * kLanes);
    const __mmask32 mask = n == 32 ? 0xffffffffu : (1u << n) - 1u;
    return (Vec)_mm512_maskz_loadu_epi16(mask, row + 2 * unit);
  }
  template <class Rows>
  static __attribute__((always_inline)) inline Vec pair(const Rows& rows, int64_t first, int64_t k,
                                                        int64_t count, int64_t d, int64_t size) {
    const __mmask16 mask = static_cast<__mmask16>((1u << lanes_left(size, d)) - 1u);
    const __m256i none = _mm256_setzero_si256();
    const __m256i even = 2 * k < count ? _mm256_maskz_loadu_epi16(mask, rows(first + 2 * k) + d) : none;
    const __m256i odd =
        2 * k + 1 < count ? _mm256_maskz_loadu_epi16(mask, rows(first + 2 * k + 1) + d) : none;
    const __m512i high = _mm512_slli_epi32(_mm512_cvtepu16_epi32(odd), 16);
    return (Vec)_mm512_or_si512(_mm512_cvtepu16_epi32(even), high);
  }
  static __attribute__((always_inline)) inline Vec negate(Vec x) {
    return (Vec)_mm512_xor_si512((__m512i)x, _mm512_set1_epi32(static_cast<int>(0x80008000u)));
  }
};
#endif

// Rows of one head lie far apart, where no hardware prefetcher looks: asks for all lines of a row to come.
template <class T>
GPTCORE_INLINE void prefetch_row(const T* row, int64_t size) {
  for (int64_t d = 0; d < size; d += 64 / static_cast<int64_t>(sizeof(T))) __builtin_prefetch(row + d);
}
constexpr int kPrefetchRows = 24;

GPTCORE_INLINE void store_units(float* p, Vec x) { store(p, x); }
GPTCORE_INLINE void store_units(uint32_t* p, Vec x) { store(reinterpret_cast<float*>(p), x); }

// `depth` counts units and is a multiple of kLanes; `size` is the head size in values. Rows [first, first +
// count) are read, rows up to `padded` written.
template <class Units, class T, class Rows>
void pack_rows(const Rows& rows, int64_t first, int64_t count, int64_t padded, int64_t size, int64_t depth,
               bool negate, typename Units::Unit* out) {
  using Read = Reader<Units, T>;
  for (int64_t r = 0; r < padded; ++r, out += depth) {
    const T* row = r < count ? rows(first + r) : nullptr;
    if (r + 8 < count) prefetch_row(rows(first + r + 8), size);
    for (int64_t u = 0; u < depth; u += kLanes) {
      Vec x = r < count ? Read::depth(row, u, size) : Vec{};
      if (negate) x = Read::negate(x);
      store_units(out + u, x);
    }
  }
}

template <class Units, class T, class Rows>
void pack_columns(const Rows& rows, int64_t first, int64_t count, int64_t padded, int64_t size, int64_t depth,
                  typename Units::Unit* out) {
  using Read = Reader<Units, T>;
  for (int64_t r = 0; r < padded; r += kLanes, out += depth * kLanes) {
    const T* row[kLanes];
    for (int i = 0; i < kLanes; ++i) {
      row[i] = r + i < count ? rows(first + r + i) : nullptr;
      if (r + i + kPrefetchRows < count) prefetch_row(rows(first + r + i + kPrefetchRows), size);
    }
    for (int64_t u = 0; u < depth; u += kLanes) {
      Vec block[kLanes];
#pragma GCC unroll 16
      for (int i = 0; i < kLanes; ++i) block[i] = row[i] ? Read::depth(row[i], u, size) : Vec{};
      transpose(block);
#pragma GCC unroll 16
      for (int i = 0; i < kLanes; ++i) store_units(out + (u + i) * kLanes, block[i]);
    }
  }
}

// `units` counts the units of `padded` rows; panels lie `panel` units apart.
template <class Units, class T, class Rows>
void pack_pairs(const Rows& rows, int64_t first, int64_t count, int64_t units, int64_t panel, int64_t size,
                typename Units::Unit* out) {
  using Read = Reader<Units, T>;
  for (int64_t k = 0; k < units; ++k) {
    for (int64_t r = k * Units::kPerUnit; r < (k + 1) * Units::kPerUnit; ++r) {
      if (r + kPrefetchRows < count) prefetch_row(rows(first + r + kPrefetchRows), size);
    }
    for (int64_t d = 0; d < size; d += kLanes) {
      store_units(out + d / kLanes * panel + k * kLanes, Read::pair(rows, first, k, count, d, size));
    }
  }
}

template <class Units, class T, class Rows>
void pack_transposed(const Rows& rows, int64_t first, int64_t count, int64_t units, int64_t size,
                     int64_t out_row, typename Units::Unit* out) {
  using Read = Reader<Units, T>;
  for (int64_t k = 0; k < units; k += kLanes) {
    for (int64_t d = 0; d < size; d += kLanes) {
      Vec block[kLanes];
#pragma GCC unroll 16
      for (int i = 0; i < kLanes; ++i) block[i] = Read::pair(rows, first, k + i, count, d, size);
      transpose(block);
#pragma GCC unroll 16
      for (int i = 0; i < kLanes; ++i) store_units(out + (d + i) * out_row + k, block[i]);
    }
  }
}

}  // namespace
}  // namespace GPTCORE_ISA_NS
}  // namespace gptcore
