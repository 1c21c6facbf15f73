#include "kernels/matmul/matmul.h"

#include <cstring>

#include "core/arena.h"
#include "core/check.h"
#include "core/isa.h"
#include "kernels/matmul/matmul_body.h"

namespace gptcore {

GPTCORE_BODIES(MatmulBodies, matmul_f32_bodies)
GPTCORE_BODIES_AMX(MatmulBodies, matmul_bf16_bodies)

namespace {

// The stride of the dimension that is not contiguous, and which one that is.
struct Layout {
  bool depth_lines;
  int64_t stride;
};

Layout layout_of(const Checker& check, const TensorView& tensor, const char* name, int depth_dim) {
  const int64_t across = tensor.stride(1 - depth_dim), along = tensor.stride(depth_dim);
  if (along == 1 || tensor.size(depth_dim) <= 1) return {true, across};
  if (across != 1 && tensor.size(1 - depth_dim) > 1) {
    check.fail(name,
               "strides (" + std::to_string(tensor.stride(0)) + ", " + std::to_string(tensor.stride(1)) + ")",
               "a contiguous dimension");
  }
  return {false, along};
}

// bf16 is the upper half of an f32.
void widen_to(float* out, const uint16_t* in, int64_t n) {
  for (int64_t i = 0; i < n; ++i) {
    const uint32_t bits = static_cast<uint32_t>(in[i]) << 16;
    std::memcpy(out + i, &bits, sizeof(bits));
  }
}

}  // namespace

void matmul(const TensorView& a, const TensorView& b, const TensorView& bias, const TensorView& out,
            bool accumulate, bool transpose_a, bool transpose_b) {
  const Checker check("matmul");
  check.input(a, "a", {DType::f32, DType::bf16});
  check.input(b, "b", {a.dtype});
  check.ndim(a, "a", 2);
  check.ndim(b, "b", 2);
  MatmulArgs x{};
  x.m = a.size(transpose_a ? 1 : 0), x.k = a.size(transpose_a ? 0 : 1), x.n = b.size(transpose_b ? 0 : 1);
  if (b.size(transpose_b ? 1 : 0) != x.k) {
    check.fail("b", describe(b), "a depth of " + std::to_string(x.k) + " as in a");
  }
  check.output(out, "out", {DType::f32, a.dtype});
  check.shape(out, "out", {x.m, x.n});
  check.last_contiguous(out, "out");
  if (accumulate && out.dtype != DType::f32) check.fail("out", describe(out), "f32 to accumulate into");
  if (bias) {
    check.input(bias, "bias", {DType::f32, a.dtype});
    check.shape(bias, "bias", {x.n});
    check.contiguous(bias, "bias");
    if (accumulate) check.fail("bias", describe(bias), "none where the product is accumulated");
  }
  const Layout a_layout = layout_of(check, a, "a", transpose_a ? 0 : 1);
  const Layout b_layout = layout_of(check, b, "b", transpose_b ? 1 : 0);
  if (x.m == 0 || x.n == 0) return;

  const bool widen = bias && bias.dtype == DType::bf16;
  const Scratch wide_bias(widen ? static_cast<size_t>(x.n) * sizeof(float) : 0);
  if (widen) widen_to(wide_bias.as<float>(), static_cast<const uint16_t*>(bias.data), x.n);
  x.a = a.data, x.b = b.data, x.out = out.data;
  x.bias = widen ? wide_bias.as<float>() : static_cast<const float*>(bias.data);
  x.a_depth_lines = a_layout.depth_lines, x.a_stride = a_layout.stride;
  x.b_depth_lines = b_layout.depth_lines, x.b_stride = b_layout.stride;
  x.out_stride = out.stride(0);
  x.accumulate = accumulate, x.f32_out = out.dtype == DType::f32, x.dtype = a.dtype;
  const IsaTable<MatmulBodies>& table =
      a.dtype == DType::f32 ? matmul_f32_bodies_table : matmul_bf16_bodies_table;
  const bool few = x.m <= kFewRows && x.a_depth_lines;
  if (x.m == 1 && !x.b_depth_lines) {
    table.pick().one_row(x);
  } else if (few) {
    x.b_depth_lines ? table.pick().few_rows(x) : table.pick().few_rows_across(x);
  } else {
    table.pick().packed(x);
  }
}

}  // namespace gptcore
