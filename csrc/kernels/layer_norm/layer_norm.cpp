#include "kernels/layer_norm/layer_norm.h"

#include "core/isa.h"
#include "core/rows.h"
#include "kernels/layer_norm/layer_norm_body.h"

namespace gptcore {

GPTCORE_BODIES(LayerNormBodies, layer_norm_bodies)

namespace {

void check_stats(const Checker& check, const TensorView& stats, int64_t rows) {
  check.input(stats, "stats", {DType::f32});
  check.shape(stats, "stats", {2, rows});
  check.contiguous(stats, "stats");
}

}  // namespace

void layer_norm_forward(const TensorView& x, const TensorView& residual, const TensorView& weight,
                        const TensorView& bias, float eps, float weight_offset, const TensorView& y,
                        const TensorView& h, const TensorView& stats) {
  const Checker check("layer_norm", layer_norm_bodies_table.device);
  check.input(x, "x", {DType::f32, DType::bf16});
  const Rows rows = rows_of(check, x, "x");
  if (rows.width == 0) check.fail("x", "a last dimension of 0", "at least 1 element to normalise");
  LayerNormForward a{};
  if (residual) a.residual_stride = checked_stride(check, residual, "residual", x, "x");
  if (weight) check_vector(check, weight, "weight", rows.width, {DType::f32, DType::bf16});
  if (bias) check_vector(check, bias, "bias", rows.width, {weight ? weight.dtype : bias.dtype});
  if (bias) check.dtype(bias, "bias", {DType::f32, DType::bf16});
  a.y_stride = checked_stride(check, y, "out", x, "x");
  check.writable(y, "out");
  if (residual) {
    a.h_stride = checked_stride(check, h, "h", x, "x");
    check.writable(h, "h");
  }
  if (stats) {
    check_stats(check, stats, rows.count);
    check.writable(stats, "stats");
  }
  if (!(eps >= 0)) check.fail("eps", std::to_string(eps), "0 or more");
  check_weight_offset(check, weight_offset, weight);

  a.x = x.data, a.residual = residual.data, a.weight = weight.data, a.bias = bias.data;
  a.y = y.data, a.h = residual ? h.data : nullptr;
  a.mean = stats.as<float>(), a.rstd = stats ? a.mean + rows.count : nullptr;
  a.rows = rows.count, a.width = rows.width, a.x_stride = rows.stride, a.eps = eps;
  a.weight_offset = weight_offset;
  a.bf16_weight = is_bf16(weight ? weight : bias);
  layer_norm_bodies_table.pick(check).forward[is_bf16(x)](a);
}

void layer_norm_backward(const TensorView& grad_y, const TensorView& grad_h, const TensorView& h,
                         const TensorView& weight, float weight_offset, const TensorView& stats,
                         const TensorView& dx, const TensorView& dweight, const TensorView& dbias) {
  const Checker check("layer_norm_backward", layer_norm_bodies_table.device);
  check.input(h, "h", {DType::f32, DType::bf16});
  const Rows rows = rows_of(check, h, "h");
  if (rows.width == 0) check.fail("h", "a last dimension of 0", "at least 1 element");
  LayerNormBackward a{};
  a.grad_y_stride = checked_stride(check, grad_y, "grad_y", h, "h");
  if (grad_h) a.grad_h_stride = checked_stride(check, grad_h, "grad_h", h, "h");
  if (weight) check_vector(check, weight, "weight", rows.width, {DType::f32, DType::bf16});
  check_weight_offset(check, weight_offset, weight);
  check_stats(check, stats, rows.count);
  a.dx_stride = checked_stride(check, dx, "dx", h, "h");
  check.writable(dx, "dx");
  const DType weight_dtype = weight ? weight.dtype : h.dtype;
  if (dweight) check_vector(check, dweight, "dweight", rows.width, {DType::f32, weight_dtype});
  if (dbias)
    check_vector(check, dbias, "dbias", rows.width, {dweight ? dweight.dtype : DType::f32, weight_dtype});
  if (dweight && dbias && dweight.dtype != dbias.dtype) {
    check.fail_type("dbias", name_of(dbias.dtype), name_of(dweight.dtype));
  }

  a.grad_y = grad_y.data, a.grad_h = grad_h.data, a.h = h.data, a.weight = weight.data;
  a.mean = stats.as<float>(), a.rstd = a.mean + rows.count;
  a.dx = dx.data, a.dweight = dweight.data, a.dbias = dbias.data;
  a.bf16_weight = is_bf16(weight), a.bf16_dweight = is_bf16(dweight ? dweight : dbias);
  a.rows = rows.count, a.width = rows.width, a.h_stride = rows.stride;
  a.weight_offset = weight_offset;
  layer_norm_bodies_table.pick(check).backward[is_bf16(h)](a);
}

}  // namespace gptcore
