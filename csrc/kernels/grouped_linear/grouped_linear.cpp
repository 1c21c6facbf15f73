#include "kernels/grouped_linear/grouped_linear.h"

#include <cstring>
#include <vector>

#include "core/check.h"
#include "core/isa.h"
#include "core/parallel.h"
#include "kernels/grouped_linear/grouped_device.h"
#include "kernels/grouped_linear/grouped_linear_body.h"

namespace gptcore {

GPTCORE_BODIES(GroupedBodies, grouped_f32_bodies)
GPTCORE_BODIES_AMX(GroupedBodies, grouped_bf16_bodies)
GPTCORE_DEVICE_BODIES(GroupedDeviceBodies, grouped_device_bodies)

namespace {

const GroupedBodies& bodies_of(DType dtype) {
  return (dtype == DType::f32 ? grouped_f32_bodies_table : grouped_bf16_bodies_table).pick();
}

// The blocks that a task may not exceed leave this many for each thread where there is so much to do.
constexpr int64_t kTasksPerThread = 8;

int64_t parts_of(int64_t size, int64_t most) { return size == 0 ? 0 : (size - 1) / most + 1; }

std::vector<GroupBlock> cut_into(const std::vector<GroupProduct>& products, const GroupedBodies& bodies,
                                 int64_t narrower) {
  std::vector<GroupBlock> blocks;
  for (size_t e = 0; e < products.size(); ++e) {
    const GroupProduct& p = products[e];
    if (p.m == 0 || p.n == 0) continue;
    const GroupCut most = bodies.cut(p);
    // Blocks of about equal size, whole units of what the body multiplies at once.
    const int64_t unit = most.least_columns, down = parts_of(p.m, most.rows);
    const int64_t rows = ((p.m - 1) / down / 16 + 1) * 16;
    const int64_t wanted = most.columns / narrower < unit ? unit : most.columns / narrower;
    const int64_t columns = ((p.n - 1) / parts_of(p.n, wanted) / unit + 1) * unit;
    for (int64_t column = 0; column < p.n; column += columns) {
      for (int64_t row = 0; row < p.m; row += rows) {  // next to each other: they share the weight's lines
        blocks.push_back({static_cast<int64_t>(e), row, p.m - row < rows ? p.m - row : rows, column,
                          p.n - column < columns ? p.n - column : columns});
      }
    }
  }
  return blocks;
}

void run(const std::vector<GroupProduct>& products, const GroupedBodies& bodies) {
  std::vector<GroupBlock> blocks = cut_into(products, bodies, 1);
  const size_t enough = static_cast<size_t>(kTasksPerThread * num_threads());
  for (int64_t narrower = 2; narrower <= 16 && blocks.size() < enough; narrower *= 2) {
    blocks = cut_into(products, bodies, narrower);
  }
  parallel_for(static_cast<int64_t>(blocks.size()), [&](int64_t task, int) {
    const GroupBlock& block = blocks[static_cast<size_t>(task)];
    bodies.block(products[static_cast<size_t>(block.expert)], block);
  });
}

struct Groups {
  int64_t experts, inner, outer;  // E, Cin, Cout
  DType dtype;
  const int32_t* offsets;

  int64_t begin(int64_t e) const { return offsets[e]; }
  int64_t rows(int64_t e) const { return int64_t{offsets[e + 1]} - offsets[e]; }
  int64_t weight_bytes() const { return inner * outer * size_of(dtype); }
};

Groups checked_groups(const Checker& check, const TensorView& rows, const char* rows_name, bool rows_are_out,
                      const TensorView& weight, const TensorView& offsets) {
  check.input(rows, rows_name, {DType::f32, DType::bf16});
  check.ndim(rows, rows_name, 2);
  check.last_contiguous(rows, rows_name);
  check.input(weight, "weight", {rows.dtype});
  check.ndim(weight, "weight", 3);
  check.contiguous(weight, "weight");
  const Groups groups{weight.size(0), weight.size(2), weight.size(1), rows.dtype, offsets.as<int32_t>()};
  if (rows.size(1) != (rows_are_out ? groups.outer : groups.inner)) {
    check.fail("weight", describe(weight),
               std::string(rows_are_out ? "Cout" : "Cin") + " = " + std::to_string(rows.size(1)) + " as in " +
                   rows_name);
  }
  check.input(offsets, "offsets", {DType::i32});
  check.shape(offsets, "offsets", {groups.experts + 1});
  check.contiguous(offsets, "offsets");
  if (check.device() != Device::cpu) {  // whose kernels cut offsets to the rows there are
    if (groups.experts <= kMostDeviceExperts) return groups;
    check.fail("weight", std::to_string(groups.experts) + " experts",
               "at most " + std::to_string(kMostDeviceExperts));
  }
  if (groups.offsets[0] != 0) {
    check.fail("offsets", "offsets[0] = " + std::to_string(groups.offsets[0]), "0");
  }
  for (int64_t e = 0; e < groups.experts; ++e) {
    if (groups.rows(e) >= 0) continue;
    check.fail("offsets",
               std::to_string(groups.offsets[e + 1]) + " behind " + std::to_string(groups.offsets[e]),
               "offsets that do not fall");
  }
  if (groups.begin(groups.experts) > rows.size(0)) {
    check.fail("offsets", "offsets[E] = " + std::to_string(groups.begin(groups.experts)),
               "at most M = " + std::to_string(rows.size(0)));
  }
  return groups;
}

void check_rows_out(const Checker& check, const TensorView& out, const char* name, DType dtype,
                    const TensorView& rows, int64_t width) {
  check.output(out, name, {dtype});
  check.shape(out, name, {rows.size(0), width});
  check.last_contiguous(out, name);
}

void check_bias(const Checker& check, const TensorView& bias, const char* name, const Groups& groups) {
  check.input(bias, name, {DType::f32, groups.dtype});
  check.shape(bias, name, {groups.experts, groups.outer});
  check.contiguous(bias, name);
}

char* bytes_at(const TensorView& tensor, int64_t elements) {
  return tensor.as<char>() + elements * size_of(tensor.dtype);
}

void zero_rows(const TensorView& out, int64_t first) {
  const size_t bytes = static_cast<size_t>(out.size(1) * size_of(out.dtype));
  if (bytes == 0) return;
  parallel_ranges(out.size(0) - first, 64, [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r) std::memset(bytes_at(out, (first + r) * out.stride(0)), 0, bytes);
  });
}

// out[r] = in[r] times the weight, or its transpose.
void multiply_rows(const Groups& groups, const TensorView& in, const TensorView& weight, bool transpose,
                   const TensorView& bias, const TensorView& out, int64_t largest) {
  const GroupedBodies& bodies = bodies_of(groups.dtype);
  const bool past_caches = bodies.past_caches(out.data, out.numel() * size_of(out.dtype));
  std::vector<GroupProduct> products(static_cast<size_t>(groups.experts));
  for (int64_t e = 0; e < groups.experts; ++e) {
    GroupProduct& p = products[static_cast<size_t>(e)];
    p.a = bytes_at(in, groups.begin(e) * in.stride(0));
    p.b = weight.as<char>() + e * groups.weight_bytes();
    p.bias = bias ? bytes_at(bias, e * groups.outer) : nullptr;
    p.out = bytes_at(out, groups.begin(e) * out.stride(0));
    p.m = groups.rows(e) > largest ? 0 : groups.rows(e);
    p.n = transpose ? groups.outer : groups.inner, p.k = transpose ? groups.inner : groups.outer;
    p.a_stride = in.stride(0), p.b_stride = groups.inner, p.out_stride = out.stride(0);
    p.a_depth_lines = true, p.b_depth_lines = transpose;
    p.accumulate = false, p.f32_out = out.dtype == DType::f32, p.f32_bias = bias.dtype == DType::f32;
    p.past_caches = past_caches;
    p.dtype = groups.dtype;
  }
  run(products, bodies);
  zero_rows(out, groups.begin(groups.experts));
}

void weight_gradient(const Groups& groups, const TensorView& dy, const TensorView& x,
                     const TensorView& dweight, bool accumulate, int64_t largest) {
  const GroupedBodies& bodies = bodies_of(groups.dtype);
  // Ordinary stores would read all of the gradient first.
  const bool past_caches =
      !accumulate && bodies.past_caches(dweight.data, dweight.numel() * size_of(dweight.dtype));
  std::vector<GroupProduct> products(static_cast<size_t>(groups.experts));
  for (int64_t e = 0; e < groups.experts; ++e) {
    GroupProduct& p = products[static_cast<size_t>(e)];
    p.a = bytes_at(dy, groups.begin(e) * dy.stride(0));
    p.b = bytes_at(x, groups.begin(e) * x.stride(0));
    p.bias = nullptr;
    p.out = bytes_at(dweight, e * groups.inner * groups.outer);
    p.m = groups.outer, p.n = groups.inner, p.k = groups.rows(e);
    if ((p.k == 0 && accumulate) || p.k > largest) p.m = 0;
    p.a_stride = dy.stride(0), p.b_stride = x.stride(0), p.out_stride = groups.inner;
    p.a_depth_lines = false, p.b_depth_lines = false;
    p.accumulate = accumulate, p.f32_out = dweight.dtype == DType::f32, p.f32_bias = false;
    p.past_caches = past_caches;
    p.dtype = groups.dtype;
  }
  run(products, bodies);
}

void bias_gradient(const Groups& groups, const TensorView& dy, const TensorView& dbias) {
  constexpr int64_t kColumns = 512;
  const GroupedBodies& bodies = bodies_of(groups.dtype);
  const int64_t across = parts_of(groups.outer, kColumns);
  parallel_for(groups.experts * across, [&](int64_t task, int) {
    const int64_t e = task / across, column = task % across * kColumns, left = groups.outer - column;
    bodies.column_sums({bytes_at(dy, groups.begin(e) * dy.stride(0) + column),
                        bytes_at(dbias, e * groups.outer + column), groups.rows(e), dy.stride(0),
                        left < kColumns ? left : kColumns, dy.dtype == DType::f32,
                        dbias.dtype == DType::f32});
  });
}

// --- the same by another device's kernels ----------------------------------------------------------------------

void multiply_rows(const GroupedDeviceBodies& bodies, const Groups& groups, const TensorView& in,
                   const TensorView& weight, bool transpose, const TensorView& bias, const TensorView& out) {
  GroupedRowsDevice a{};
  a.in = in.data, a.weight = weight.data, a.bias = bias.data, a.out = out.data, a.offsets = groups.offsets;
  a.experts = groups.experts, a.rows = in.size(0);
  a.depth = transpose ? groups.inner : groups.outer, a.width = transpose ? groups.outer : groups.inner;
  a.in_stride = in.stride(0), a.out_stride = out.stride(0);
  a.depth_lines = transpose, a.f32_bias = bias.dtype == DType::f32;
  bodies.rows[is_bf16(in)](a);
}

void weight_gradient(const GroupedDeviceBodies& bodies, const Groups& groups, const TensorView& dy,
                     const TensorView& x, const TensorView& dweight, bool accumulate) {
  GroupedWeightDevice a{};
  a.dy = dy.data, a.x = x.data, a.dweight = dweight.data, a.offsets = groups.offsets;
  a.experts = groups.experts, a.rows = dy.size(0), a.outer = groups.outer, a.inner = groups.inner;
  a.dy_stride = dy.stride(0), a.x_stride = x.stride(0);
  a.accumulate = accumulate, a.f32_out = dweight.dtype == DType::f32;
  bodies.weight[is_bf16(dy)](a);
}

void bias_gradient(const GroupedDeviceBodies& bodies, const Groups& groups, const TensorView& dy,
                   const TensorView& dbias) {
  GroupedBiasDevice a{};
  a.dy = dy.data, a.dbias = dbias.data, a.offsets = groups.offsets;
  a.experts = groups.experts, a.rows = dy.size(0), a.outer = groups.outer, a.dy_stride = dy.stride(0);
  a.f32_out = dbias.dtype == DType::f32;
  bodies.bias[is_bf16(dy)](a);
}

}  // namespace

void grouped_linear(const TensorView& x, const TensorView& weight, const TensorView& offsets,
                    const TensorView& bias, const TensorView& out, int64_t largest) {
  const Checker check("grouped_linear", grouped_device_bodies_table.device);
  const Groups groups = checked_groups(check, x, "x", false, weight, offsets);
  if (bias) check_bias(check, bias, "bias", groups);
  check_rows_out(check, out, "out", groups.dtype, x, groups.outer);
  if (const GroupedDeviceBodies* bodies = grouped_device_bodies_table.pick_device(check)) {
    return multiply_rows(*bodies, groups, x, weight, true, bias, out);
  }
  multiply_rows(groups, x, weight, true, bias, out, largest);
}

void grouped_linear_backward(const TensorView& dy, const TensorView& x, const TensorView& weight,
                             const TensorView& offsets, const TensorView& dx, const TensorView& dweight,
                             const TensorView& dbias, bool accumulate, int64_t largest_dx,
                             int64_t largest_dweight) {
  const Checker check("grouped_linear_backward", grouped_device_bodies_table.device);
  const Groups groups = checked_groups(check, dy, "dy", true, weight, offsets);
  if (x || dweight) {
    check.input(x, "x", {groups.dtype});
    check.shape(x, "x", {dy.size(0), groups.inner});
    check.last_contiguous(x, "x");
  }
  if (dx) check_rows_out(check, dx, "dx", groups.dtype, dy, groups.inner);
  if (dweight) {
    check.output(dweight, "dweight", {DType::f32, groups.dtype});
    check.same_shape(dweight, "dweight", weight, "weight");
    check.contiguous(dweight, "dweight");
  }
  if (dbias) {
    check_bias(check, dbias, "dbias", groups);
    check.writable(dbias, "dbias");
  }
  if (const GroupedDeviceBodies* bodies = grouped_device_bodies_table.pick_device(check)) {
    if (dx) multiply_rows(*bodies, groups, dy, weight, false, {}, dx);
    if (dweight) weight_gradient(*bodies, groups, dy, x, dweight, accumulate);
    if (dbias) bias_gradient(*bodies, groups, dy, dbias);
    return;
  }
  if (dx) multiply_rows(groups, dy, weight, false, {}, dx, largest_dx);
  if (dweight) weight_gradient(groups, dy, x, dweight, accumulate, largest_dweight);
  if (dbias) bias_gradient(groups, dy, dbias);
}

}  // namespace gptcore
