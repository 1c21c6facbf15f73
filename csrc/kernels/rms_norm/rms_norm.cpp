#include "kernels/rms_norm/rms_norm.h"

#include "core/isa.h"
#include "core/rows.h"
#include "kernels/rms_norm/rms_norm_body.h"

namespace gptcore {

GPTCORE_BODIES(RmsNormBodies, rms_norm_bodies)

void rms_norm_forward(const TensorView& x, const TensorView& residual, const TensorView& weight, float eps,
                      float weight_offset, const TensorView& y, const TensorView& h, const TensorView& rstd) {
  const Checker check("rms_norm", rms_norm_bodies_table.device);
  check.input(x, "x", {DType::f32, DType::bf16});
  const Rows rows = rows_of(check, x, "x");
  if (rows.width == 0) check.fail("x", "a last dimension of 0", "at least 1 element to normalise");
  RmsNormForward a{};
  if (residual) a.residual_stride = checked_stride(check, residual, "residual", x, "x");
  if (weight) check_vector(check, weight, "weight", rows.width, {DType::f32, DType::bf16});
  a.y_stride = checked_stride(check, y, "out", x, "x");
  check.writable(y, "out");
  if (residual) {
    a.h_stride = checked_stride(check, h, "h", x, "x");
    check.writable(h, "h");
  }
  if (rstd) {
    check_vector(check, rstd, "rstd", rows.count, {DType::f32});
    check.writable(rstd, "rstd");
  }
  if (!(eps >= 0)) check.fail("eps", std::to_string(eps), "0 or more");
  check_weight_offset(check, weight_offset, weight);

  a.x = x.data, a.residual = residual.data, a.weight = weight.data;
  a.bf16_weight = is_bf16(weight);
  a.y = y.data, a.h = residual ? h.data : nullptr, a.rstd = rstd.as<float>();
  a.rows = rows.count, a.width = rows.width, a.x_stride = rows.stride, a.eps = eps;
  a.weight_offset = weight_offset;
  rms_norm_bodies_table.pick(check).forward[is_bf16(x)](a);
}

void rms_norm_backward(const TensorView& grad_y, const TensorView& grad_h, const TensorView& h,
                       const TensorView& weight, float weight_offset, const TensorView& rstd,
                       const TensorView& dx, const TensorView& dweight) {
  const Checker check("rms_norm_backward", rms_norm_bodies_table.device);
  check.input(h, "h", {DType::f32, DType::bf16});
  const Rows rows = rows_of(check, h, "h");
  if (rows.width == 0) check.fail("h", "a last dimension of 0", "at least 1 element");
  RmsNormBackward a{};
  a.grad_y_stride = checked_stride(check, grad_y, "grad_y", h, "h");
  if (grad_h) a.grad_h_stride = checked_stride(check, grad_h, "grad_h", h, "h");
  if (weight) check_vector(check, weight, "weight", rows.width, {DType::f32, DType::bf16});
  check_weight_offset(check, weight_offset, weight);
  check_vector(check, rstd, "rstd", rows.count, {DType::f32});
  a.dx_stride = checked_stride(check, dx, "dx", h, "h");
  check.writable(dx, "dx");
  const DType weight_dtype = weight ? weight.dtype : h.dtype;
  if (dweight) {
    check_vector(check, dweight, "dweight", rows.width, {DType::f32, weight_dtype});
    check.writable(dweight, "dweight");
  }

  a.grad_y = grad_y.data, a.grad_h = grad_h.data, a.h = h.data, a.weight = weight.data;
  a.rstd = rstd.as<float>(), a.dx = dx.data, a.dweight = dweight.data;
  a.bf16_weight = is_bf16(weight), a.bf16_dweight = is_bf16(dweight);
  a.rows = rows.count, a.width = rows.width, a.h_stride = rows.stride;
  a.weight_offset = weight_offset;
  rms_norm_bodies_table.pick(check).backward[is_bf16(h)](a);
}

}  // namespace gptcore
