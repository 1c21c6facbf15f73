#include "kernels/moe_dispatch/moe_dispatch.h"

#include "core/check.h"
#include "core/isa.h"
#include "kernels/moe_dispatch/moe_dispatch_body.h"

namespace gptcore {

GPTCORE_BODIES(MoeDispatchBodies, moe_dispatch_bodies)

namespace {

void check_matrix(const Checker& check, const TensorView& tensor, const char* name, DType type, int64_t rows,
                  int64_t width) {
  check.input(tensor, name, {type});
  check.ndim(tensor, name, 2);
  check.shape(tensor, name, {rows, width});
  check.last_contiguous(tensor, name);
}

// A matrix of any height in a dtype of the kernels, and one of another height but its width and dtype.
void check_pair(const Checker& check, const TensorView& first, const char* first_name,
                const TensorView& second, const char* second_name) {
  check.input(first, first_name, {DType::f32, DType::bf16});
  check.ndim(first, first_name, 2);
  check.last_contiguous(first, first_name);
  check_matrix(check, second, second_name, first.dtype, -1, first.size(1));
}

void check_choices(const Checker& check, const TensorView& tensor, const char* name, DType type,
                   const TensorView& rows) {
  check.input(tensor, name, {type});
  check.same_shape(tensor, name, rows, "rows");
  check.contiguous(tensor, name);
}

// (N, K) of rows below `count`.
void check_rows(const Checker& check, const TensorView& rows, int64_t tokens, int64_t count) {
  check.input(rows, "rows", {DType::i32});
  check.ndim(rows, "rows", 2);
  check.shape(rows, "rows", {tokens, -1});
  check.contiguous(rows, "rows");
  if (rows.size(1) < 1 || rows.size(1) > kMostDispatchChoices) {
    check.fail("rows", std::to_string(rows.size(1)) + " choices",
               "1 to " + std::to_string(kMostDispatchChoices));
  }
  if (check.device() != Device::cpu) return;  // kernels there leave out what lies outside
  const int32_t* row = rows.as<int32_t>();
  for (int64_t i = 0; i < rows.numel(); ++i) {
    if (row[i] < -1 || row[i] >= count) {
      check.fail("rows", std::to_string(row[i]), "-1 to " + std::to_string(count - 1));
    }
  }
}

// How many rows are in use; 0 where only the device knows.
int64_t check_offsets(const Checker& check, const TensorView& offsets, int64_t count) {
  check.input(offsets, "offsets", {DType::i32});
  check.ndim(offsets, "offsets", 1);
  check.contiguous(offsets, "offsets");
  if (offsets.size(0) < 1) check.fail("offsets", "no numbers", "one more than there are experts");
  if (check.device() != Device::cpu) return 0;
  const int64_t used = offsets.as<int32_t>()[offsets.size(0) - 1];
  if (used < 0 || used > count) {
    check.fail("offsets", std::to_string(used) + " at its end", "0 to " + std::to_string(count) + " rows");
  }
  return used;
}

}  // namespace

void moe_dispatch_forward(const TensorView& x, const TensorView& rows, const TensorView& offsets,
                          const TensorView& out) {
  const Checker check("moe_dispatch", moe_dispatch_bodies_table.device);
  check_pair(check, x, "x", out, "out");
  check.writable(out, "out");
  check_rows(check, rows, x.size(0), out.size(0));
  MoeDispatch a{};
  a.used = check_offsets(check, offsets, out.size(0)), a.all = out.size(0);
  a.used_rows = offsets.as<int32_t>() + offsets.size(0) - 1;
  a.tokens = x.data, a.sorted = out.data, a.rows = rows.as<int32_t>();
  a.count = x.size(0), a.choices = rows.size(1), a.width = x.size(1);
  a.token_stride = x.stride(0), a.sorted_stride = out.stride(0);
  moe_dispatch_bodies_table.pick(check).dispatch[is_bf16(x)](a);
}

void moe_combine_forward(const TensorView& y, const TensorView& rows, const TensorView& gates,
                         const TensorView& offsets, const TensorView& out) {
  const Checker check("moe_combine", moe_dispatch_bodies_table.device);
  check_pair(check, y, "y", out, "out");
  check.writable(out, "out");
  check_rows(check, rows, out.size(0), y.size(0));
  if (gates) check_choices(check, gates, "gates", DType::f32, rows);
  if (offsets) check_offsets(check, offsets, y.size(0));
  MoeCombine a{};
  a.sorted = y.data, a.tokens = out.data, a.rows = rows.as<int32_t>();
  a.gates = gates ? gates.as<float>() : nullptr;
  a.count = out.size(0), a.choices = rows.size(1), a.width = y.size(1), a.all = y.size(0);
  a.token_stride = out.stride(0), a.sorted_stride = y.stride(0);
  moe_dispatch_bodies_table.pick(check).combine[is_bf16(y)](a);
}

void moe_combine_backward(const TensorView& dout, const TensorView& y, const TensorView& rows,
                          const TensorView& gates, const TensorView& offsets, const TensorView& dy,
                          const TensorView& dgates) {
  const Checker check("moe_combine_backward", moe_dispatch_bodies_table.device);
  check_pair(check, y, "y", dout, "dout");
  check_rows(check, rows, dout.size(0), y.size(0));
  check_choices(check, gates, "gates", DType::f32, rows);
  check_matrix(check, dy, "dy", y.dtype, y.size(0), y.size(1));
  check.writable(dy, "dy");
  check_choices(check, dgates, "dgates", DType::f32, rows);
  check.writable(dgates, "dgates");
  MoeCombineBackward a{};
  a.used = check_offsets(check, offsets, y.size(0)), a.all = y.size(0);
  a.used_rows = offsets.as<int32_t>() + offsets.size(0) - 1;
  a.dtokens = dout.data, a.sorted = y.data, a.dsorted = dy.data, a.rows = rows.as<int32_t>();
  a.gates = gates.as<float>(), a.dgates = dgates.as<float>();
  a.count = dout.size(0), a.choices = rows.size(1), a.width = y.size(1);
  a.token_stride = dout.stride(0), a.sorted_stride = y.stride(0), a.dsorted_stride = dy.stride(0);
  moe_dispatch_bodies_table.pick(check).combine_backward[is_bf16(y)](a);
}

}  // namespace gptcore
