// The step of adafactor.h in three phases, for parameters whose slices have several owners: whatever looks at more than
// one element is summed over fixed blocks of the whole, so that the bits do not depend on the cut.
//
// A call has slices [start, start + N) of wholes, flattened. Blocks of a factored whole are `block` rows of a matrix,
// beginning anew with each matrix; of another, 1024 elements. Slices begin and end with blocks. Between the phases the
// caller puts the blocks of all owners together, in order.
//
//   1  adafactor_statistics   R moves on; for each own block statistics (2 m + 3), factored:
//                             sums over its rows of g^2 by columns, of g^2 / R by columns, of R, the least R with a
//                             gradient, the sum of p^2; else (2): the sums of p^2 and of (g / sqrt(V))^2
//   2  adafactor_updates      from all blocks' statistics: C moves on, in every owner's copy; totals (matrices + 2):
//                             mean R of each matrix, the sums of p^2 and of (g / sqrt(V))^2, NaN where that must be
//                             summed by elements; which is done for each own block into sums (1), 0 elsewhere
//   3  adafactor_apply        from totals and all blocks' sums: V, exp_avgs, params and copies
//
// Shapes   params, grads, variances, exp_avgs, copies N elements of a slice in one shape; row_vars one element for each
//          row of the slice, col_vars m for each matrix of the whole, any shapes; statistics and sums (blocks, width),
//          own or all; totals (matrices + 2), 2 where unfactored. All contiguous.
// Types    as in adafactor.h; statistics, totals and sums f64.
// None     as in adafactor.h; grad_norm is of all owners' gradients: there must be one. It may be not finite where it comes
//          in a tensor, and then nothing is written, sums neither.
// Sums     within a block as in adafactor.h, f64 over blocks in order.
// Bits     equal for any thread count and any cut.
// CUDA     numbers may be tensors there, as in adafactor.h. Chunks of its own, which blocks fix: the same bits for any cut.
// Cost     reads g twice and p twice, writes p; g once more where adafactor.h says so.
// Errors   ValueError or TypeError on any violated line above, before anything of a phase is written.
#pragma once

#include <cstdint>
#include <vector>

#include "kernels/adafactor/adafactor.h"
#include "kernels/adafactor/adafactor_blocks_body.h"

namespace gptcore {

struct AdafactorSlices {
  AdafactorLists lists;
  const std::vector<AdafactorSlice>& slices;
  const std::vector<double>& weight_decay;
  // In place of the options of its names, as in adafactor.h; counts and result are not asked for.
  std::optional<AdafactorGiven> given = std::nullopt;
};

void adafactor_statistics(const AdafactorSlices& slices, const AdafactorOptions& options,
                          const std::vector<TensorView>& statistics);
void adafactor_updates(const AdafactorSlices& slices, const AdafactorOptions& options,
                       const std::vector<TensorView>& statistics, const std::vector<TensorView>& totals,
                       const std::vector<TensorView>& sums);
void adafactor_apply(const AdafactorSlices& slices, const AdafactorOptions& options,
                     const std::vector<TensorView>& totals, const std::vector<TensorView>& sums);

}  // namespace gptcore
