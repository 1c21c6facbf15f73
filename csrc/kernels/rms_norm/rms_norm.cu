// Root mean square normalisation on CUDA: the kernels that norms share, without a mean.
#include "core/cuda/norm_backward.cuh"
#include "core/cuda/norm_forward.cuh"
#include "kernels/rms_norm/rms_norm_body.h"

namespace gptcore::cuda {
namespace {

template <class T>
void forward(const RmsNormForward& a) {
  NormForward n{};
  n.x = a.x, n.residual = a.residual, n.weight = a.weight;
  n.y = a.y, n.h = a.h, n.rstd = a.rstd;
  n.rows = a.rows, n.width = a.width;
  n.x_stride = a.x_stride, n.residual_stride = a.residual_stride;
  n.y_stride = a.y_stride, n.h_stride = a.h_stride;
  n.eps = a.eps, n.offset = a.weight_offset, n.bf16_weight = a.bf16_weight;
  norm_forward<T, false>(n);
}

template <class T>
void backward(const RmsNormBackward& a) {
  NormBackward n{};
  n.grad_y = a.grad_y, n.grad_h = a.grad_h, n.h = a.h, n.weight = a.weight, n.rstd = a.rstd;
  n.dx = a.dx, n.dweight = a.dweight;
  n.rows = a.rows, n.width = a.width;
  n.grad_y_stride = a.grad_y_stride, n.grad_h_stride = a.grad_h_stride;
  n.h_stride = a.h_stride, n.dx_stride = a.dx_stride;
  n.offset = a.weight_offset, n.bf16_weight = a.bf16_weight, n.bf16_dweight = a.bf16_dweight;
  norm_backward<T, false>(n);
}

}  // namespace

GPTCORE_CUDA_BODIES(RmsNormBodies, rms_norm_bodies) = {{forward<float>, forward<bf16>},
                                                       {backward<float>, backward<bf16>}};

}  // namespace gptcore::cuda
