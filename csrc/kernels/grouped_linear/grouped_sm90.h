// The experts' products in bf16 by Hopper's copy engine and warpgroup products, for tensors that the engine can read.
#pragma once

#include "kernels/grouped_linear/grouped_device.h"

namespace gptcore::cuda {

// False, and nothing done, where the tensors or the device do not fit.
bool multiply_rows_sm90(const GroupedRowsDevice& a, bool packed_out);
bool multiply_weight_sm90(const GroupedWeightDevice& a, bool packed_out);

}  // namespace gptcore::cuda
