#include "kernels/layer_norm/layer_norm.h"

#include "core/check.h"
#include "core/isa.h"
#include "kernels/layer_norm/layer_norm_body.h"

namespace gptcore {

GPTCORE_BODIES(LayerNormBodies, layer_norm_bodies)

namespace {

int is_bf16(const TensorView& tensor) { return tensor.dtype == DType::bf16; }

void check_matrix(const Checker& check, const TensorView& tensor, const char* name, const TensorView& like,
                  const char* like_name) {
  check.input(tensor, name, {like.dtype});
  check.same_shape(tensor, name, like, like_name);
  check.last_contiguous(tensor, name);
}

void check_vector(const Checker& check, const TensorView& tensor, const char* name, int64_t size,
                  std::initializer_list<DType> types) {
  check.input(tensor, name, types);
  check.shape(tensor, name, {size});
  check.contiguous(tensor, name);
}

void check_stats(const Checker& check, const TensorView& stats, int64_t rows) {
  check.input(stats, "stats", {DType::f32});
  check.shape(stats, "stats", {2, rows});
  check.contiguous(stats, "stats");
}

}  // namespace

void layer_norm_forward(const TensorView& x, const TensorView& residual, const TensorView& weight,
                        const TensorView& bias, float eps, const TensorView& y, const TensorView& h,
                        const TensorView& stats) {
  const Checker check("layer_norm");
  check.input(x, "x", {DType::f32, DType::bf16});
  check.ndim(x, "x", 2);
  check.last_contiguous(x, "x");
  const int64_t rows = x.size(0), width = x.size(1);
  check.that(width > 0, "x", "a last dimension of 0", "at least 1 element to normalise");
  if (residual) check_matrix(check, residual, "residual", x, "x");
  if (weight) check_vector(check, weight, "weight", width, {DType::f32, DType::bf16});
  if (bias) check_vector(check, bias, "bias", width, {weight ? weight.dtype : bias.dtype});
  check_matrix(check, y, "out", x, "x");
  check.writable(y, "out");
  if (stats) check.writable(stats, "stats");
  if (residual) {
    check_matrix(check, h, "h", x, "x");
    check.writable(h, "h");
  }
  if (stats) check_stats(check, stats, rows);
  check.that(eps >= 0, "eps", std::to_string(eps), "0 or more");
  if (rows == 0) return;

  LayerNormForward a{};
  a.x = x.data, a.residual = residual.data, a.weight = weight.data, a.bias = bias.data;
  a.y = y.data, a.h = residual ? h.data : nullptr;
  a.mean = stats.as<float>(), a.rstd = stats ? a.mean + rows : nullptr;
  a.rows = rows, a.width = width, a.eps = eps;
  a.x_stride = x.stride(0), a.y_stride = y.stride(0);
  if (residual) a.residual_stride = residual.stride(0), a.h_stride = h.stride(0);
  const int weight_type = is_bf16(weight ? weight : bias ? bias : x);
  layer_norm_bodies_table.pick().forward[is_bf16(x)][weight_type](a);
}

void layer_norm_backward(const TensorView& grad_y, const TensorView& grad_h, const TensorView& h,
                         const TensorView& weight, const TensorView& stats, const TensorView& dx,
                         const TensorView& dweight, const TensorView& dbias) {
  const Checker check("layer_norm_backward");
  check.input(h, "h", {DType::f32, DType::bf16});
  check.ndim(h, "h", 2);
  check.last_contiguous(h, "h");
  const int64_t rows = h.size(0), width = h.size(1);
  check.that(width > 0, "h", "a last dimension of 0", "at least 1 element");
  check_matrix(check, grad_y, "grad_y", h, "h");
  if (grad_h) check_matrix(check, grad_h, "grad_h", h, "h");
  if (weight) check_vector(check, weight, "weight", width, {DType::f32, DType::bf16});
  check_stats(check, stats, rows);
  check_matrix(check, dx, "dx", h, "h");
  check.writable(dx, "dx");
  const DType weight_dtype = weight ? weight.dtype : h.dtype;
  if (dweight) check_vector(check, dweight, "dweight", width, {DType::f32, weight_dtype});
  if (dbias) check_vector(check, dbias, "dbias", width, {dweight ? dweight.dtype : DType::f32, weight_dtype});
  if (dweight && dbias && dweight.dtype != dbias.dtype) {
    check.fail_type("dbias", name_of(dbias.dtype), name_of(dweight.dtype));
  }

  LayerNormBackward a{};
  a.grad_y = grad_y.data, a.grad_h = grad_h.data, a.h = h.data, a.weight = weight.data;
  a.mean = stats.as<float>(), a.rstd = stats ? a.mean + rows : nullptr;
  a.dx = dx.data, a.dweight = dweight.data, a.dbias = dbias.data;
  a.f32_dweight = (dweight ? dweight : dbias).dtype == DType::f32;
  a.rows = rows, a.width = width;
  a.grad_y_stride = grad_y.stride(0), a.h_stride = h.stride(0), a.dx_stride = dx.stride(0);
  if (grad_h) a.grad_h_stride = grad_h.stride(0);
  layer_norm_bodies_table.pick().backward[is_bf16(h)][weight_dtype == DType::bf16](a);
}

}  // namespace gptcore
