// The checks of linear_cross_entropy's arguments, for whichever way it is computed.
#pragma once

#include "core/check.h"
#include "kernels/linear_cross_entropy/linear_cross_entropy.h"

namespace gptcore {

// All classes, of which a slice has some.
inline int64_t all_classes(const LinearCrossEntropyOptions& options, const TensorView& weight) {
  return options.num_classes > 0 ? options.num_classes : weight.size(0);
}

void check_linear_cross_entropy(const Checker& check, const TensorView& x, const TensorView& weight,
                                const TensorView& targets, const LinearCrossEntropyOptions& options);

void check_linear_cross_entropy_gradients(const Checker& check, const TensorView& x, const TensorView& weight,
                                          const LinearCrossEntropyOptions& options,
                                          const LinearCrossEntropyGradients& gradients);

void check_linear_cross_entropy_outputs(const Checker& check, const LinearCrossEntropyOutputs& outputs,
                                        int64_t rows, const std::string& reduction);

}  // namespace gptcore
