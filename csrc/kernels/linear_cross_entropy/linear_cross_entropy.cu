// What lies between linear_cross_entropy's products on CUDA: see core/cuda/loss_rows.cuh.
#include "core/cuda/loss_rows.cuh"
#include "core/cuda/loss_totals.cuh"
#include "kernels/linear_cross_entropy/linear_cross_entropy_rows_body.h"

namespace gptcore::cuda {

GPTCORE_CUDA_BODIES(LinearCrossEntropyRowsBodies, linear_cross_entropy_rows_bodies) = {
    run_loss_divisors, {run_loss_rows<float, float>, run_loss_rows<float, bf16>}, run_loss_totals};

}  // namespace gptcore::cuda
