#include "core/arena.h"
#include "core/simd.h"
#include "kernels/matmul/matmul_few_across.h"
#include "kernels/matmul/matmul_one_row.h"
#include "kernels/matmul/matmul_packed.h"

namespace gptcore {
namespace GPTCORE_ISA_NS {
namespace {

// Rows of b per task: enough bytes that starting a task does not show.
constexpr int64_t kTaskBytes = 1 << 17;

#if defined(__AVX512BF16__)
// 32 products a step; the pairs' order is the instruction's.
struct Bf16Dot {
  using Element = bf16;
  using Line = __m512i;
  static constexpr int kWidth = 32;
  static __attribute__((always_inline)) Line read(const bf16* p) { return _mm512_loadu_si512(p); }
  static __attribute__((always_inline)) Line read_n(const bf16* p, int64_t n) {
    return _mm512_maskz_loadu_epi16(static_cast<__mmask32>((uint64_t{1} << n) - 1), p);
  }
  static __attribute__((always_inline)) Vec multiply_add(Line a, Line b, Vec sum) {
    return (Vec)_mm512_dpbf16_ps((__m512)sum, (__m512bh)a, (__m512bh)b);
  }
};
#endif

template <class T>
struct PlainDot {
  using Element = T;
  using Line = Vec;
  static constexpr int kWidth = kLanes;
  static __attribute__((always_inline)) Line read(const T* p) { return load(p); }
  static __attribute__((always_inline)) Line read_n(const T* p, int64_t n) { return load_n(p, n); }
  static __attribute__((always_inline)) Vec multiply_add(Line a, Line b, Vec sum) { return sum + a * b; }
};

// Accumulators of a block, rows of a by rows of b. Rows of b wait in L1 for all rows of a, which stream from L2,
// so many rows of b are worth more than many of a. AVX-512: 24 of 32 registers, else 8 of 16.
#if defined(__AVX512F__)
constexpr int kDotRows = 3, kDotColumns = 8;
#else
constexpr int kDotRows = 2, kDotColumns = 4;
#endif

// Bytes of depth of a row of b at a time: kDotColumns of them are half of the smallest L1.
constexpr int64_t kDepthBytes = 3072;

// The sums of kDotColumns vectors' lanes, each by reduce_add's tree.
GPTCORE_INLINE void reduce_add_all(const Vec (&x)[kDotColumns], float* sums) {
#if defined(__AVX512F__)
  // Each step adds the halves of what is left of two vectors and puts the results side by side.
  const auto eights = [](Vec a, Vec b) __attribute__((always_inline)) {
    return _mm512_shuffle_f32x4((__m512)a, (__m512)b, 0x44) +
           _mm512_shuffle_f32x4((__m512)a, (__m512)b, 0xee);
  };
  const auto fours = [](__m512 a, __m512 b) __attribute__((always_inline)) {
    return _mm512_shuffle_f32x4(a, b, 0x88) + _mm512_shuffle_f32x4(a, b, 0xdd);
  };
  const __m512 low = fours(eights(x[0], x[1]), eights(x[2], x[3]));
  const __m512 high = fours(eights(x[4], x[5]), eights(x[6], x[7]));
  const __m512 twos = _mm512_shuffle_ps(low, high, 0x44) + _mm512_shuffle_ps(low, high, 0xee);
  const __m512 ones = _mm512_shuffle_ps(twos, twos, 0x88) + _mm512_shuffle_ps(twos, twos, 0xdd);
  // Lane i of 128 bits begins with sums i and 4 + i.
  const __m512i order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 0, 0, 0, 0, 0, 0, 0, 0);
  _mm256_storeu_ps(sums, _mm512_castps512_ps256(_mm512_permutexvar_ps(order, ones)));
#else
  for (int j = 0; j < kDotColumns; ++j) sums[j] = reduce_add(x[j]);
#endif
}

GPTCORE_INLINE void put(const MatmulArgs& x, int64_t m, int64_t n, const float* values, int count) {
  const int64_t at = m * x.out_stride + n;
  for (int j = 0; j < count; ++j) {
    const float value = x.bias ? values[j] + x.bias[n + j] : values[j];
    if (!x.f32_out) {
      static_cast<bf16*>(x.out)[at + j] = narrow(value);
    } else if (x.accumulate) {
      static_cast<float*>(x.out)[at + j] += value;
    } else {
      static_cast<float*>(x.out)[at + j] = value;
    }
  }
}

// Without this GCC reads a line again from memory for each product it enters, and loads become the limit.
template <class Line>
GPTCORE_INLINE void keep_in_register([[maybe_unused]] Line& line) {
#if defined(__AVX512F__)
  __asm__("" : "+v"(line));
#elif defined(__x86_64__)
  __asm__("" : "+x"(line));
#endif
}

// Part [begin, end) of the depth; `sums` carries the running vectors from part to part.
struct Depth {
  int64_t begin, end;
  Vec* sums;
};

// Dots of kM rows of a with kN rows of b. Whatever kM, kN and the parts, an element is one running vector over k,
// then the tree of reduce_add: blocks of any shape give the same bits.
template <class Dot, int kM, int kN>
GPTCORE_INLINE void dots(const MatmulArgs& x, int64_t m, int64_t n, const Depth& depth) {
  using T = typename Dot::Element;
  const T* a = static_cast<const T*>(x.a) + m * x.a_stride + depth.begin;
  const T* b = static_cast<const T*>(x.b) + n * x.b_stride + depth.begin;
  Vec sum[kM][kN] = {};
  if (depth.begin > 0) {
#pragma GCC unroll 24
    for (int i = 0; i < kM * kN; ++i) sum[i / kN][i % kN] = depth.sums[i];
  }
  const auto step = [&](auto read) __attribute__((always_inline)) {
    typename Dot::Line row[kM];
#pragma GCC unroll 4
    for (int i = 0; i < kM; ++i) row[i] = read(a + i * x.a_stride);
#pragma GCC unroll 8
    for (int j = 0; j < kN; ++j) {
      typename Dot::Line line = read(b + j * x.b_stride);
      keep_in_register(line);
#pragma GCC unroll 4
      for (int i = 0; i < kM; ++i) sum[i][j] = Dot::multiply_add(row[i], line, sum[i][j]);
    }
  };
  int64_t k = depth.begin;
  for (; k + Dot::kWidth <= depth.end; k += Dot::kWidth, a += Dot::kWidth, b += Dot::kWidth) {
    step([](const T* p) __attribute__((always_inline)) { return Dot::read(p); });
  }
  if (depth.end < x.k) {
#pragma GCC unroll 24
    for (int i = 0; i < kM * kN; ++i) depth.sums[i] = sum[i / kN][i % kN];
    return;
  }
  if (k < depth.end) {
    const int64_t rest = depth.end - k;
    step([rest](const T* p) __attribute__((always_inline)) { return Dot::read_n(p, rest); });
  }
#pragma GCC unroll 4
  for (int i = 0; i < kM; ++i) {
    float values[kN];
    if constexpr (kN == kDotColumns) {
      reduce_add_all(sum[i], values);
    } else {
      values[0] = reduce_add(sum[i][0]);
    }
    put(x, m + i, n, values, kN);
  }
}

// All rows of a against kN rows of b, part by part of the depth.
template <class Dot, int kN>
GPTCORE_INLINE void columns(const MatmulArgs& x, int64_t n, Vec* sums) {
  constexpr int64_t kPart = kDepthBytes / static_cast<int64_t>(sizeof(typename Dot::Element));
  const int64_t part = x.m <= kDotRows ? x.k : kPart;
  for (int64_t begin = 0; begin == 0 || begin < x.k; begin += part) {
    const int64_t end = smaller(begin + part, x.k);
    int64_t m = 0;
    for (; m + kDotRows <= x.m; m += kDotRows) {
      dots<Dot, kDotRows, kN>(x, m, n, {begin, end, sums + m * kN});
    }
    if constexpr (kDotRows > 2) {
      if (m + 2 <= x.m) dots<Dot, 2, kN>(x, m, n, {begin, end, sums + m * kN}), m += 2;
    }
    if (m < x.m) dots<Dot, 1, kN>(x, m, n, {begin, end, sums + m * kN});
    if (x.k == 0) break;
  }
}

template <class Dot>
void few_rows(const MatmulArgs& x) {
  const int64_t row_bytes = x.k * static_cast<int64_t>(sizeof(typename Dot::Element)) + 1;
  const int64_t wanted = ceil_div(kTaskBytes, row_bytes * ceil_div(x.m, 4));
  const int64_t grain = ceil_div(wanted, kDotColumns) * kDotColumns;
  run_tasks(x, ceil_div(x.n, grain), [&](int64_t task) {
    const Scratch carried(static_cast<size_t>(x.m * kDotColumns) * sizeof(Vec));
    Vec* sums = carried.as<Vec>();
    const int64_t end = smaller((task + 1) * grain, x.n);
    int64_t n = task * grain;
    for (; n + kDotColumns <= end; n += kDotColumns) columns<Dot, kDotColumns>(x, n, sums);
    for (; n < end; ++n) columns<Dot, 1>(x, n, sums);
  });
}

}  // namespace

extern const MatmulBodies matmul_f32_bodies, matmul_bf16_bodies;
const MatmulBodies matmul_f32_bodies = {few_rows<PlainDot<float>>, few_rows_across<float>, one_row<float>,
                                        packed_product<PlainPolicy>};
#if defined(__AVX512BF16__)
const MatmulBodies matmul_bf16_bodies = {few_rows<Bf16Dot>, few_rows_across<bf16>, one_row<bf16>,
                                         packed_product<Bf16Policy>};
#else
const MatmulBodies matmul_bf16_bodies = {few_rows<PlainDot<bf16>>, few_rows_across<bf16>, one_row<bf16>,
                                         packed_product<Bf16Policy>};
#endif

}  // namespace GPTCORE_ISA_NS
}  // namespace gptcore
