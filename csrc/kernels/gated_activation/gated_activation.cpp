#include "kernels/gated_activation/gated_activation.h"

#include "core/isa.h"
#include "core/rows.h"
#include "kernels/gated_activation/gated_activation_body.h"

namespace gptcore {

GPTCORE_BODIES(GatedActivationBodies, gated_activation_bodies)

namespace {

const void* second_half(const TensorView& tensor, int64_t width) {
  return tensor.data ? static_cast<char*>(tensor.data) + width * size_of(tensor.dtype) : nullptr;
}

// The last dimension of y and of its gradient: half of a packed gate's.
int64_t checked_width(const Checker& check, int kind, const TensorView& gate, const TensorView& up) {
  if (kind < 0 || kind >= kActivations + kPacked) check.fail("kind", std::to_string(kind), "0 to 7");
  check.input(gate, "gate", {DType::f32, DType::bf16});
  if (gate.ndim < 1) check.fail("gate", "a scalar", "at least 1 dimension");
  const int64_t last = gate.size(-1);
  if (kind < kPacked) return last;
  if (last % 2 != 0) {
    check.fail("gate_up", "a last dimension of " + std::to_string(last), "an even one (gate | up)");
  }
  if (up) check.fail_type("up", "a tensor", "None, since gate holds both halves");
  return last / 2;
}

void check_like(const Checker& check, const TensorView& tensor, const char* name, const TensorView& like,
                const char* like_name) {
  check.input(tensor, name, {like.dtype});
  check.same_shape(tensor, name, like, like_name);
}

// y and grad_y: the shape of gate but for the last dimension of a packed one.
Rows result_rows(const Checker& check, const TensorView& tensor, const char* name, const TensorView& gate,
                 int64_t width) {
  check.input(tensor, name, {gate.dtype});
  bool same = tensor.ndim == gate.ndim && tensor.size(-1) == width;
  for (int d = 0; same && d + 1 < tensor.ndim; ++d) same = tensor.sizes[d] == gate.sizes[d];
  if (!same) {
    check.fail(name, describe(tensor),
               "the leading dimensions of 'gate' and a last one of " + std::to_string(width));
  }
  return rows_of(check, tensor, name);
}

void check_bias(const Checker& check, const TensorView& bias, const char* name, int64_t width,
                std::initializer_list<DType> types) {
  check.input(bias, name, types);
  check.shape(bias, name, {width});
  check.contiguous(bias, name);
}

// Biases have one type between them; the first defined one says which.
DType check_biases(const Checker& check, const TensorView& gate_bias, const TensorView& up_bias, bool packed,
                   bool gated, int64_t width, const char* gate_name, const char* up_name) {
  if (gate_bias) {
    check_bias(check, gate_bias, gate_name, packed ? 2 * width : width, {DType::f32, DType::bf16});
  }
  if (up_bias) {
    if (!gated || packed) check.fail_type(up_name, "a tensor", "None without a separate 'up'");
    if (gate_bias) {
      check_bias(check, up_bias, up_name, width, {gate_bias.dtype});
    } else {
      check_bias(check, up_bias, up_name, width, {DType::f32, DType::bf16});
    }
  }
  return gate_bias ? gate_bias.dtype : up_bias ? up_bias.dtype : DType::f32;
}

// Without biases, rows that follow each other without gaps are one long row, with one tail to handle.
template <class Arguments>
void join_rows(Arguments& a, std::initializer_list<int64_t> strides) {
  if (a.rows == 0) return;
  for (const int64_t stride : strides) {
    if (stride != a.width) return;
  }
  a.width *= a.rows, a.rows = 1;
}

}  // namespace

void gated_activation_forward(int kind, const TensorView& gate, const TensorView& up,
                              const TensorView& gate_bias, const TensorView& up_bias, const TensorView& y) {
  const Checker check("gated_activation", gated_activation_bodies_table.device);
  const int64_t width = checked_width(check, kind, gate, up);
  const bool packed = kind >= kPacked;
  const Rows gate_rows = rows_of(check, gate, "gate");
  GatedActivationForward a{};
  if (up) {
    check_like(check, up, "up", gate, "gate");
    a.up_stride = rows_of(check, up, "up").stride;
  }
  const DType bias_type =
      check_biases(check, gate_bias, up_bias, packed, static_cast<bool>(up), width, "gate_bias", "up_bias");
  const Rows y_rows = result_rows(check, y, "out", gate, width);
  check.writable(y, "out");
  if (gate_rows.count == 0 || width == 0) return;

  a.activation = packed ? kind - kPacked : kind;
  a.gate = gate.data, a.up = up.data, a.gate_bias = gate_bias.data, a.up_bias = up_bias.data;
  if (packed) {
    a.up = second_half(gate, width), a.up_stride = gate_rows.stride;
    a.up_bias = second_half(gate_bias, width);
  }
  a.bf16_bias = bias_type == DType::bf16;
  a.y = y.data, a.rows = gate_rows.count, a.width = width;
  a.gate_stride = gate_rows.stride, a.y_stride = y_rows.stride;
  if (!a.gate_bias && !a.up_bias) {
    join_rows(a, {a.gate_stride, a.up ? a.up_stride : width, a.y_stride});
  }
  gated_activation_bodies_table.pick(check).forward[is_bf16(gate)](a);
}

void gated_activation_backward(int kind, const TensorView& grad_y, const TensorView& gate,
                               const TensorView& up, const TensorView& gate_bias, const TensorView& up_bias,
                               const TensorView& dgate, const TensorView& dup, const TensorView& dgate_bias,
                               const TensorView& dup_bias) {
  const Checker check("gated_activation_backward", gated_activation_bodies_table.device);
  const int64_t width = checked_width(check, kind, gate, up);
  const bool packed = kind >= kPacked, gated = packed || up;
  const Rows gate_rows = rows_of(check, gate, "gate");
  GatedActivationBackward a{};
  if (up) {
    check_like(check, up, "up", gate, "gate");
    check_like(check, dup, "dup", gate, "gate");
    check.writable(dup, "dup");
    a.up_stride = rows_of(check, up, "up").stride, a.dup_stride = rows_of(check, dup, "dup").stride;
  }
  const DType bias_type =
      check_biases(check, gate_bias, up_bias, packed, gated, width, "gate_bias", "up_bias");
  const Rows grad_rows = result_rows(check, grad_y, "grad_y", gate, width);
  check_like(check, dgate, "dgate", gate, "gate");
  check.writable(dgate, "dgate");
  const Rows dgate_rows = rows_of(check, dgate, "dgate");
  const DType dbias_type =
      check_biases(check, dgate_bias, dup_bias, packed, gated, width, "dgate_bias", "dup_bias");
  if (dgate_bias) check.writable(dgate_bias, "dgate_bias");
  if (dup_bias) check.writable(dup_bias, "dup_bias");
  if (width == 0) return;

  a.activation = packed ? kind - kPacked : kind;
  a.grad_y = grad_y.data, a.gate = gate.data, a.up = up.data;
  a.gate_bias = gate_bias.data, a.up_bias = up_bias.data;
  a.dgate = dgate.data, a.dup = dup.data, a.dgate_bias = dgate_bias.data, a.dup_bias = dup_bias.data;
  a.gate_stride = gate_rows.stride, a.grad_y_stride = grad_rows.stride, a.dgate_stride = dgate_rows.stride;
  if (packed) {
    a.up = second_half(gate, width), a.up_stride = gate_rows.stride;
    a.up_bias = second_half(gate_bias, width);
    a.dup = const_cast<void*>(second_half(dgate, width)), a.dup_stride = dgate_rows.stride;
    a.dup_bias = const_cast<void*>(second_half(dgate_bias, width));
  }
  a.bf16_bias = bias_type == DType::bf16, a.bf16_dbias = dbias_type == DType::bf16;
  a.rows = gate_rows.count, a.width = width;
  if (!a.gate_bias && !a.up_bias && !a.dgate_bias && !a.dup_bias) {
    join_rows(a, {a.grad_y_stride, a.gate_stride, a.up ? a.up_stride : width, a.dgate_stride,
                  a.up ? a.dup_stride : width});
  }
  gated_activation_bodies_table.pick(check).backward[is_bf16(gate)](a);
}

}  // namespace gptcore
