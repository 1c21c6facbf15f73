// A square of kLanes x kLanes numbers in registers turned over, for kernels whose lanes run across rows.
#pragma once

#include "core/simd.h"

namespace gptcore {
namespace GPTCORE_ISA_NS {

// Exchanges the blocks of `step` rows by `step` lanes that lie beside the diagonal.
template <int step>
GPTCORE_INLINE void exchange_blocks(Vec* rows) {
  const VecI lane = lane_index();
  const VecI inner = lane & (step - 1), outer = lane & ~(2 * step - 1), second = (lane & step) != 0;
  // Lanes from kLanes on are those of the second operand.
  const VecI lower = outer + inner + (second & kLanes);
  const VecI upper = lower + step;
#pragma GCC unroll 16
  for (int i = 0; i < kLanes; ++i) {
    if (i & step) continue;
    const Vec a = rows[i], b = rows[i + step];
#if defined(__clang__)
    Vec low, high;
    for (int l = 0; l < kLanes; ++l) {
      low[l] = l & step ? b[l - step] : a[l];
      high[l] = l & step ? b[l] : a[l + step];
    }
    rows[i] = low, rows[i + step] = high;
#else
    rows[i] = __builtin_shuffle(a, b, lower);
    rows[i + step] = __builtin_shuffle(a, b, upper);
#endif
  }
}

// rows[i][j] becomes rows[j][i].
GPTCORE_INLINE void transpose(Vec* rows) {
  exchange_blocks<1>(rows);
  exchange_blocks<2>(rows);
#if defined(__AVX2__)
  exchange_blocks<4>(rows);
#endif
#if defined(__AVX512F__)
  exchange_blocks<8>(rows);
#endif
}

}  // namespace GPTCORE_ISA_NS
}  // namespace gptcore
