#include "kernels/rotary/rotary.h"

#include "core/check.h"
#include "core/isa.h"
#include "kernels/rotary/rotary_body.h"

namespace gptcore {

GPTCORE_BODIES(RotaryBodies, rotary_bodies)

namespace {

void check_tables(const Checker& check, const TensorView& cos, const TensorView& sin, int64_t head_size) {
  check.input(cos, "cos", {DType::f32});
  check.ndim(cos, "cos", 2);
  check.contiguous(cos, "cos");
  check.input(sin, "sin", {DType::f32});
  check.same_shape(sin, "sin", cos, "cos");
  check.contiguous(sin, "sin");
  if (cos.size(1) < 1 || 2 * cos.size(1) > head_size) {
    check.fail("cos", std::to_string(cos.size(1)) + " angles",
               "1 to " + std::to_string(head_size / 2) + " (half the head size)");
  }
}

void check_positions(const Checker& check, const TensorView& positions, int64_t offset, int64_t batch,
                     int64_t tokens, int64_t length) {
  const auto limit = [length] { return "positions within the table of " + std::to_string(length); };
  if (!positions) {
    if (offset < 0 || offset + tokens > length) {
      check.fail("position", std::to_string(offset) + " for " + std::to_string(tokens) + " tokens", limit());
    }
    return;
  }
  check.input(positions, "position", {DType::i32});
  check.contiguous(positions, "position");
  if (positions.ndim == 2) {
    check.shape(positions, "position", {batch, tokens});
  } else {
    check.shape(positions, "position", {tokens});
  }
  if (rotary_bodies_table.pick_device(check)) return;  // a device's kernel makes NaN of a wrong one
  const int32_t* p = positions.as<int32_t>();
  for (int64_t i = 0, n = positions.numel(); i < n; ++i) {
    if (p[i] < 0 || p[i] >= length) check.fail("position", std::to_string(p[i]), limit());
  }
}

RotaryStrides strides_of(const TensorView& x) {
  const bool batched = x.ndim == 4;
  return {batched ? x.stride(0) : 0, x.stride(-3), x.stride(-2)};
}

}  // namespace

void rotary(const TensorView& x, const TensorView& cos, const TensorView& sin, const TensorView& positions,
            int64_t offset, bool interleaved, bool inverse, const TensorView& out) {
  const Checker check("rotary", rotary_bodies_table.device);
  check.input(x, "x", {DType::f32, DType::bf16});
  if (x.ndim != 3 && x.ndim != 4) check.fail("x", describe(x), "(B, T, H, D) or (T, H, D)");
  check.last_contiguous(x, "x");
  check.output(out, "out", {x.dtype});
  check.same_shape(out, "out", x, "x");
  check.last_contiguous(out, "out");
  Rotary a{};
  a.batch = x.ndim == 4 ? x.size(0) : 1;
  a.tokens = x.size(-3), a.heads = x.size(-2), a.head_size = x.size(-1);
  check_tables(check, cos, sin, a.head_size);
  check_positions(check, positions, offset, a.batch, a.tokens, cos.size(0));
  if (x.numel() == 0) return;

  a.x = x.data, a.out = out.data, a.cos = cos.as<float>(), a.sin = sin.as<float>();
  a.length = cos.size(0);
  a.positions = positions.as<int32_t>();
  a.position_batch_stride = positions && positions.ndim == 2 ? a.tokens : 0;
  a.offset = offset, a.half = cos.size(1);
  a.x_strides = strides_of(x), a.out_strides = strides_of(out);
  a.interleaved = interleaved, a.inverse = inverse;
  rotary_bodies_table.pick(check).run[x.dtype == DType::bf16](a);
}

}  // namespace gptcore
