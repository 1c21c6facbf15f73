// What linear_cross_entropy_rows.cpp hands to a device's bodies, already checked.
#pragma once

#include "core/loss_rows.h"

namespace gptcore {

struct LinearCrossEntropyRowsBodies {
  void (*divisors)(const LossDivisors&);
  void (*rows[2])(const LossRows&);  // [bf16 gradients?]
  void (*totals)(const LossTotals&);
};

}  // namespace gptcore
