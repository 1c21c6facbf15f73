// Blocks of matrix products, C = A B, for kernels that fuse something around a product. Operands are packed
// into lines of 64 bytes first; one format serves AMX tiles, AVX512-BF16 dot products and plain FMA:
//
//   packed A   [group of 16 rows]   [step] [16 rows]          [64 bytes: 16 f32 or 32 bf16 along the depth k]
//   packed B   [panel of 16 columns][step] [16 k or k pairs]  [64 bytes: 16 columns of f32, or of bf16 pairs]
//
// A step is 64 bytes of depth: 1 KiB of a group or panel, which is one AMX tile. What the matrices lack to
// whole groups, panels and steps is packed as zeros.
//
// Bits: an element of C is one chain of sums over k, the same whatever surrounds it. It does not know the
// number of rows or columns, the blocking or the thread. bf16 on AMX and AVX512-BF16 treats subnormal inputs
// as zero (the instructions do); elsewhere bf16 is widened to f32 when packed.
#pragma once

#include "core/dtype.h"
#include "core/simd.h"

namespace gptcore {
namespace GPTCORE_ISA_NS {

constexpr int kLine = 64;         // bytes
constexpr int kGroup = 16;        // rows of a group, columns of a panel, lines of a step
constexpr int kStepBytes = 1024;  // a group's or panel's share of one step

template <class P>
constexpr int kStepDepth = kLine / static_cast<int>(sizeof(P));

GPTCORE_INLINE int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
GPTCORE_INLINE int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

// Bytes of `count` rows or columns packed with `steps` steps of depth.
GPTCORE_INLINE int64_t packed_bytes(int64_t count, int64_t steps) {
  return ceil_div(count, kGroup) * steps * kStepBytes;
}

// --- packing -----------------------------------------------------------------------------------------------

// A matrix in memory as lines of `width` contiguous elements; line i starts at index[i] * stride (i without
// index).
struct Lines {
  const void* data;
  DType dtype;  // f32 or bf16
  int64_t stride;
  const int32_t* index;
  int64_t count;
  int64_t width;
};

typedef uint32_t Line32 __attribute__((vector_size(64)));
typedef uint16_t Half16 __attribute__((vector_size(32)));
typedef uint16_t Half16Unaligned __attribute__((vector_size(32), aligned(2), may_alias));
typedef uint32_t Line32Unaligned __attribute__((vector_size(64), aligned(2), may_alias));

template <class T>
GPTCORE_INLINE const T* line_start(const Lines& m, int64_t i) {
  return static_cast<const T*>(m.data) + (m.index ? m.index[i] : i) * m.stride;
}

// 16 x 16 words, in place.
GPTCORE_INLINE void transpose_words(Line32* t) {
#if defined(__AVX512F__)
  Line32 u[16];
#pragma GCC unroll 8
  for (int i = 0; i < 8; ++i) {
    u[2 * i] = (Line32)_mm512_unpacklo_epi32((__m512i)t[2 * i], (__m512i)t[2 * i + 1]);
    u[2 * i + 1] = (Line32)_mm512_unpackhi_epi32((__m512i)t[2 * i], (__m512i)t[2 * i + 1]);
  }
  // u[4q..4q+3]: within each 128-bit lane j, columns 4j..4j+3 of rows 4q..4q+3 after the next stage.
  Line32 w[16];
#pragma GCC unroll 4
  for (int q = 0; q < 4; ++q) {
    w[4 * q] = (Line32)_mm512_unpacklo_epi64((__m512i)u[4 * q], (__m512i)u[4 * q + 2]);
    w[4 * q + 1] = (Line32)_mm512_unpackhi_epi64((__m512i)u[4 * q], (__m512i)u[4 * q + 2]);
    w[4 * q + 2] = (Line32)_mm512_unpacklo_epi64((__m512i)u[4 * q + 1], (__m512i)u[4 * q + 3]);
    w[4 * q + 3] = (Line32)_mm512_unpackhi_epi64((__m512i)u[4 * q + 1], (__m512i)u[4 * q + 3]);
  }
  // w[4q + c], lane j: column 4j + c of rows 4q..4q+3. Gather lane j of the four q.
#pragma GCC unroll 4
  for (int c = 0; c < 4; ++c) {
    const __m512i even_low = _mm512_shuffle_i32x4((__m512i)w[c], (__m512i)w[4 + c], 0x88);
    const __m512i odd_low = _mm512_shuffle_i32x4((__m512i)w[c], (__m512i)w[4 + c], 0xdd);
    const __m512i even_high = _mm512_shuffle_i32x4((__m512i)w[8 + c], (__m512i)w[12 + c], 0x88);
    const __m512i odd_high = _mm512_shuffle_i32x4((__m512i)w[8 + c], (__m512i)w[12 + c], 0xdd);
    t[c] = (Line32)_mm512_shuffle_i32x4(even_low, even_high, 0x88);
    t[8 + c] = (Line32)_mm512_shuffle_i32x4(even_low, even_high, 0xdd);
    t[4 + c] = (Line32)_mm512_shuffle_i32x4(odd_low, odd_high, 0x88);
    t[12 + c] = (Line32)_mm512_shuffle_i32x4(odd_low, odd_high, 0xdd);
  }
#else
  uint32_t* words = reinterpret_cast<uint32_t*>(t);
  for (int i = 1; i < 16; ++i) {
    for (int j = 0; j < i; ++j) {
      const uint32_t word = words[i * 16 + j];
      words[i * 16 + j] = words[j * 16 + i];
      words[j * 16 + i] = word;
    }
  }
#endif
}

// 64 bytes of P from n elements of T, zeros beyond.
GPTCORE_INLINE Line32 read_line(const float* p, int64_t n, const float*) {
  if (n >= 16) return *reinterpret_cast<const Line32Unaligned*>(p);
  Line32 line = {};
  if (n > 0) __builtin_memcpy(&line, p, static_cast<size_t>(n) * 4);
  return line;
}
GPTCORE_INLINE Line32 read_line(const bf16* p, int64_t n, const bf16*) {
  if (n >= 32) return *reinterpret_cast<const Line32Unaligned*>(p);
  Line32 line = {};
  if (n > 0) __builtin_memcpy(&line, p, static_cast<size_t>(n) * 2);
  return line;
}
GPTCORE_INLINE Half16 read_half(const bf16* p, int64_t n) {
  if (n >= 16) return *reinterpret_cast<const Half16Unaligned*>(p);
  Half16 half = {};
  if (n > 0) __builtin_memcpy(&half, p, static_cast<size_t>(n) * 2);
  return half;
}
// One instruction with AVX-512, as in simd.h.
GPTCORE_INLINE Line32 zero_extend_half(Half16 x) {
#if defined(__AVX512F__)
  return (Line32)_mm512_cvtepu16_epi32((__m256i)x);
#else
  return __builtin_convertvector(x, Line32);
#endif
}
GPTCORE_INLINE Line32 read_line(const bf16* p, int64_t n, const float*) {
  return zero_extend_half(read_half(p, n)) << 16;
}

// (low, high) of each pair side by side, as a line of B wants them.
GPTCORE_INLINE Line32 interleave(Half16 low, Half16 high) {
  return zero_extend_half(low) | (zero_extend_half(high) << 16);
}

// One tile (1 KiB) of packed P from elements of T. depth_lines: the matrix's lines run along the depth, so
// the tile takes 16 lines from `line` and a step of depth from `column`; else it takes a step of lines and 16
// columns.
template <class P, class T>
GPTCORE_INLINE void pack_tile(const Lines& m, bool depth_lines, bool transpose, int64_t line, int64_t column,
                              Line32* out) {
  Line32 t[16];
  const int64_t width = m.width - column, lines = m.count - line;
  if (depth_lines || sizeof(P) == 4) {
    if (lines >= 16 && width >= kStepDepth<P>) {
      for (int i = 0; i < 16; ++i) {
        t[i] = read_line(line_start<T>(m, line + i) + column, kStepDepth<P>, static_cast<const P*>(nullptr));
      }
    } else {
      for (int i = 0; i < 16; ++i) {
        t[i] = Line32{};
        if (i < lines)
          t[i] = read_line(line_start<T>(m, line + i) + column, width, static_cast<const P*>(nullptr));
      }
    }
  } else if constexpr (sizeof(P) == 2) {
    for (int i = 0; i < 16; ++i) {
      const Half16 low = 2 * i < lines ? read_half(line_start<T>(m, line + 2 * i) + column, width) : Half16{};
      const Half16 high =
          2 * i + 1 < lines ? read_half(line_start<T>(m, line + 2 * i + 1) + column, width) : Half16{};
      t[i] = interleave(low, high);
    }
  }
  if (transpose) transpose_words(t);
  for (int i = 0; i < 16; ++i) out[i] = t[i];
}

template <class P, class T>
static inline void pack_typed(const Lines& m, bool depth_lines, bool transpose, int64_t first,
                              int64_t depth_first, int64_t steps, char* out) {
  for (int64_t step = 0; step < steps; ++step) {
    const int64_t k = depth_first + step * kStepDepth<P>;
    Line32* tile = reinterpret_cast<Line32*>(out + step * kStepBytes);
    pack_tile<P, T>(m, depth_lines, transpose, depth_lines ? first : k, depth_lines ? k : first, tile);
  }
}

template <class P>
static inline void pack_any(const Lines& m, bool depth_lines, bool transpose, int64_t first,
                            int64_t depth_first, int64_t steps, char* out) {
  if constexpr (sizeof(P) == 2) {
    pack_typed<bf16, bf16>(m, depth_lines, transpose, first, depth_first, steps, out);
  } else if (m.dtype == DType::bf16) {
    pack_typed<float, bf16>(m, depth_lines, transpose, first, depth_first, steps, out);
  } else {
    pack_typed<float, float>(m, depth_lines, transpose, first, depth_first, steps, out);
  }
}

// A group of packed A: rows row..row+15, depth from depth_first. depth_lines: a line of m is a row of A.
template <class P>
static inline void pack_a(const Lines& m, bool depth_lines, int64_t row, int64_t depth_first, int64_t steps,
                          char* out) {
  pack_any<P>(m, depth_lines, !depth_lines, row, depth_first, steps, out);
}

// A panel of packed B: columns column..column+15. depth_lines: a line of m is a column of B.
template <class P>
static inline void pack_b(const Lines& m, bool depth_lines, int64_t column, int64_t depth_first,
                          int64_t steps, char* out) {
  pack_any<P>(m, depth_lines, depth_lines, column, depth_first, steps, out);
}

// --- products of packed blocks -----------------------------------------------------------------------------

// Rows x vectors of accumulators of the plain and dot-product kernels. AVX-512: 8 x 3 of 32 registers, three
// for a line of three panels, one for the broadcast; AVX2: 4 x 2 and SSE: 2 x 4 of 16.
#if defined(__AVX512F__)
constexpr int kMicroRows = 8, kMicroPanels = 3;
#elif defined(__AVX2__)
constexpr int kMicroRows = 4, kMicroPanels = 1;
#else
constexpr int kMicroRows = 2, kMicroPanels = 1;
#endif
constexpr int kVecsPerLine = kGroup / kLanes;

GPTCORE_INLINE Vec load_words(const char* p) { return *reinterpret_cast<const Vec*>(p); }

namespace {

struct PlainStep {
  static __attribute__((always_inline)) Vec multiply_add(const char* a, Vec b, Vec sum) {
    return sum + *reinterpret_cast<const float*>(a) * b;
  }
};

// How the elements of A lie within a tile of 1 KiB, in bytes: by rows as packed, or by columns, which serves
// kernels that broadcast elements just as well.
struct PackedRows {
  static constexpr int kRow = kLine, kDepth = 4;
};
struct PackedColumns {
  static constexpr int kRow = 4, kDepth = kLine;
};

// rows x (16 * panels) of C += packed A x packed B over `steps`, whose tiles of A lie a_step bytes apart.
template <class Step, class A, int kRows, int kPanels>
static inline void multiply_micro(const char* a, int64_t a_step, const char* b, int64_t b_stride,
                                  int64_t steps, float* c, int64_t ldc, bool accumulate) {
  constexpr int kVecs = kPanels * kVecsPerLine;
  Vec sum[kRows][kVecs];
#pragma GCC unroll 16
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 8
    for (int v = 0; v < kVecs; ++v) sum[r][v] = accumulate ? load(c + r * ldc + v * kLanes) : Vec{};
  }
  for (int64_t step = 0; step < steps; ++step) {
#pragma GCC unroll 4
    for (int k = 0; k < 16; ++k) {
      Vec line[kVecs];
#pragma GCC unroll 8
      for (int v = 0; v < kVecs; ++v) {
        line[v] = load_words(b + (v / kVecsPerLine) * b_stride + k * kLine + (v % kVecsPerLine) * kLanes * 4);
      }
#pragma GCC unroll 16
      for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 8
        for (int v = 0; v < kVecs; ++v)
          sum[r][v] = Step::multiply_add(a + r * A::kRow + k * A::kDepth, line[v], sum[r][v]);
      }
    }
    a += a_step;
    b += kStepBytes;
  }
#pragma GCC unroll 16
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 8
    for (int v = 0; v < kVecs; ++v) store(c + r * ldc + v * kLanes, sum[r][v]);
  }
}

// What a policy offers: the packed element P; kGroups x kPanels, the tile that multiply() makes at most;
// kBlockSteps, the steps after which C goes back to memory so that kPanels panels stay in half of L1; Scope,
// held while multiplying.
template <class Step, class Element>
struct VectorPolicy {
  using P = Element;
  static constexpr int kGroups = 1, kPanels = kMicroPanels, kBlockSteps = 8;
  struct Scope {};

  static void multiply(const char* a, int64_t, int64_t, const char* b, int64_t b_stride, int64_t panels,
                       int64_t steps, float* c, int64_t ldc, bool accumulate) {
    multiply_group<PackedRows>(a, kStepBytes, b, b_stride, panels, steps, c, ldc, accumulate);
  }

  // One group of rows; tiles of A lie a_step bytes apart.
  template <class A>
  static void multiply_group(const char* a, int64_t a_step, const char* b, int64_t b_stride, int64_t panels,
                             int64_t steps, float* c, int64_t ldc, bool accumulate) {
    for (int r = 0; r < kGroup; r += kMicroRows) {
      const char* rows = a + r * A::kRow;
      float* out = c + r * ldc;
      if constexpr (kMicroPanels == 3) {
        if (panels == 3) {
          multiply_micro<Step, A, kMicroRows, 3>(rows, a_step, b, b_stride, steps, out, ldc, accumulate);
          continue;
        }
        if (panels == 2) {
          multiply_micro<Step, A, kMicroRows, 2>(rows, a_step, b, b_stride, steps, out, ldc, accumulate);
          continue;
        }
      }
      multiply_micro<Step, A, kMicroRows, 1>(rows, a_step, b, b_stride, steps, out, ldc, accumulate);
    }
  }
};

using PlainPolicy = VectorPolicy<PlainStep, float>;

#if defined(__AVX512BF16__)
struct DotStep {
  static __attribute__((always_inline)) Vec multiply_add(const char* a, Vec b, Vec sum) {
    const __m512i pair = _mm512_set1_epi32(*reinterpret_cast<const int32_t*>(a));
    return (Vec)_mm512_dpbf16_ps((__m512)sum, (__m512bh)pair, (__m512bh)b);
  }
};
using Bf16Policy = VectorPolicy<DotStep, bf16>;
#else
using Bf16Policy = PlainPolicy;  // bf16 is widened when packed
#endif

}  // namespace

// Four panels are two tiles of two: one panel alone has too few sums to keep the multipliers busy.
template <class Policy>
GPTCORE_INLINE int64_t panels_at_once(int64_t left) {
  return Policy::kPanels == 3 && left == 4 ? 2 : smaller(Policy::kPanels, left);
}

// C (16 * groups x 16 * panels, row stride ldc) = or += packed A x packed B. Strides in bytes between groups
// and between panels. For each block of depth: panels that fit in L1, under them the groups, streamed from
// L2.
template <class Policy, class Between>
static inline void multiply_block(const char* a, int64_t a_stride, int64_t groups, const char* b,
                                  int64_t b_stride, int64_t panels, int64_t steps, float* c, int64_t ldc,
                                  bool accumulate, Between&& between) {
  if (steps == 0 && !accumulate) {
    for (int64_t r = 0; r < groups * kGroup; ++r) {
      __builtin_memset(c + r * ldc, 0, static_cast<size_t>(panels * kGroup) * sizeof(float));
    }
  }
  for (int64_t first = 0; first < steps; first += Policy::kBlockSteps) {
    const int64_t count = smaller(Policy::kBlockSteps, steps - first);
    for (int64_t p = 0, wide; p < panels; p += wide) {
      wide = panels_at_once<Policy>(panels - p);
      for (int64_t g = 0; g < groups; g += Policy::kGroups) {
        between();
        Policy::multiply(a + g * a_stride + first * kStepBytes, a_stride,
                         smaller(Policy::kGroups, groups - g), b + p * b_stride + first * kStepBytes,
                         b_stride, wide, count, c + g * kGroup * ldc + p * kGroup, ldc,
                         accumulate || first > 0);
      }
    }
  }
}

template <class Policy>
static inline void multiply_block(const char* a, int64_t a_stride, int64_t groups, const char* b,
                                  int64_t b_stride, int64_t panels, int64_t steps, float* c, int64_t ldc,
                                  bool accumulate) {
  multiply_block<Policy>(a, a_stride, groups, b, b_stride, panels, steps, c, ldc, accumulate, [] {});
}

}  // namespace GPTCORE_ISA_NS
}  // namespace gptcore
