#include "core/arena.h"
#include "core/parallel.h"
#include "core/simd.h"
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

#if defined(__AVX512F__)
constexpr int kRowBlock = 4;  // 4 x 4 accumulators of 32 registers
#else
constexpr int kRowBlock = 2;  // 2 x 4 of 16
#endif

GPTCORE_INLINE void put(const MatmulArgs& x, int64_t m, int64_t n, float value) {
  const int64_t at = m * x.out_stride + n;
  if (!x.f32_out) {
    static_cast<bf16*>(x.out)[at] = narrow(value);
  } else if (x.accumulate) {
    static_cast<float*>(x.out)[at] += value;
  } else {
    static_cast<float*>(x.out)[at] = value;
  }
}

// Dots of kM rows of a with kN rows of b. Whatever kM and kN, an element is one running vector over k, then
// the tree of reduce_add: blocks of any shape give the same bits.
template <class Dot, int kM, int kN>
GPTCORE_INLINE void dots(const MatmulArgs& x, int64_t m, int64_t n) {
  using T = typename Dot::Element;
  const T* a = static_cast<const T*>(x.a) + m * x.a_stride;
  const T* b = static_cast<const T*>(x.b) + n * x.b_stride;
  Vec sum[kM][kN] = {};
  const auto step = [&](auto read) __attribute__((always_inline)) {
    typename Dot::Line row[kM];
#pragma GCC unroll 4
    for (int i = 0; i < kM; ++i) row[i] = read(a + i * x.a_stride);
#pragma GCC unroll 8
    for (int j = 0; j < kN; ++j) {
      const typename Dot::Line line = read(b + j * x.b_stride);
#pragma GCC unroll 4
      for (int i = 0; i < kM; ++i) sum[i][j] = Dot::multiply_add(row[i], line, sum[i][j]);
    }
  };
  int64_t k = 0;
  for (; k + Dot::kWidth <= x.k; k += Dot::kWidth, a += Dot::kWidth, b += Dot::kWidth) {
    step([](const T* p) __attribute__((always_inline)) { return Dot::read(p); });
  }
  if (k < x.k) {
    const int64_t rest = x.k - k;
    step([rest](const T* p) __attribute__((always_inline)) { return Dot::read_n(p, rest); });
  }
  for (int i = 0; i < kM; ++i) {
    for (int j = 0; j < kN; ++j) put(x, m + i, n + j, reduce_add(sum[i][j]));
  }
}

// All rows of a against kN rows of b, which stay in L1.
template <class Dot, int kN>
GPTCORE_INLINE void columns(const MatmulArgs& x, int64_t n) {
  int64_t m = 0;
  for (; m + kRowBlock <= x.m; m += kRowBlock) dots<Dot, kRowBlock, kN>(x, m, n);
  for (; m < x.m; ++m) dots<Dot, 1, kN>(x, m, n);
}

template <class Dot>
void few_rows(const MatmulArgs& x) {
  const int64_t row_bytes = x.k * static_cast<int64_t>(sizeof(typename Dot::Element)) + 1;
  const int64_t grain = ceil_div(ceil_div(kTaskBytes, row_bytes * ceil_div(x.m, 4)), 8) * 8;
  parallel_for(ceil_div(x.n, grain), [&](int64_t task, int) {
    const int64_t end = smaller((task + 1) * grain, x.n);
    int64_t n = task * grain;
    if (x.m < kRowBlock) {
      for (; n + 8 <= end; n += 8) {
        for (int64_t m = 0; m < x.m; ++m) dots<Dot, 1, 8>(x, m, n);
      }
    }
    for (; n + 4 <= end; n += 4) columns<Dot, 4>(x, n);
    for (; n < end; ++n) columns<Dot, 1>(x, n);
  });
}

}  // namespace

extern const MatmulBodies matmul_f32_bodies, matmul_bf16_bodies;
const MatmulBodies matmul_f32_bodies = {few_rows<PlainDot<float>>, packed_product<PlainPolicy>};
#if defined(__AVX512BF16__)
const MatmulBodies matmul_bf16_bodies = {few_rows<Bf16Dot>, packed_product<Bf16Policy>};
#else
const MatmulBodies matmul_bf16_bodies = {few_rows<PlainDot<bf16>>, packed_product<Bf16Policy>};
#endif

}  // namespace GPTCORE_ISA_NS
}  // namespace gptcore
