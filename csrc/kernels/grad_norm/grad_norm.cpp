#include "kernels/grad_norm/grad_norm.h"

#include <algorithm>
#include <cmath>
#include <memory>

#include "core/isa.h"
#include "core/tensor_lists.h"
#include "kernels/grad_norm/grad_norm_body.h"

namespace gptcore {

GPTCORE_BODIES(GradNormBodies, grad_norm_bodies)

namespace {

static_assert(kChunkElements == kSumElements);

using Views = std::vector<TensorView>;

int64_t blocks_of(const TensorView& tensor, int64_t block) {
  const int64_t size = tensor.numel();
  return size / block + (size % block != 0);
}

std::vector<GradNormTensor> checked_tensors(const Checker& check, const Views& grads,
                                            const StepNumber& grad_scale) {
  std::vector<GradNormTensor> tensors(grads.size());
  for (size_t i = 0; i < grads.size(); ++i) {
    check.item(grads, "grads", i, grads[i], {DType::f32, DType::bf16}, false);
    tensors[i] = {grads[i].data, grads[i].dtype == DType::bf16};
  }
  check_step_number(check, grad_scale, "grad_scale");
  check_positive(check, grad_scale, "grad_scale");
  return tensors;
}

// As many blocks as a chunk has room for, or one.
std::vector<GradNormTask> tasks_of(const Views& grads, int64_t block) {
  const int64_t blocks = std::max<int64_t>(1, kChunkElements / block);
  std::vector<GradNormTask> tasks;
  int64_t first = 0;
  for (size_t i = 0; i < grads.size(); ++i) {
    const int64_t size = grads[i].numel(), count = blocks_of(grads[i], block);
    for (int64_t b = 0; b < count; b += blocks) {
      const int64_t begin = b * block;
      const int64_t elements = count - b > blocks ? blocks * block : size - begin;
      tasks.push_back({{static_cast<int64_t>(i), begin, elements}, first + b});
    }
    first += count;
  }
  return tasks;
}

// Writes the blocks' sums of squares; whether an element is inf or NaN.
bool sum_squares(const Views& grads, const std::vector<GradNormTensor>& tensors, int64_t block,
                 double* sums) {
  const std::vector<GradNormTask> tasks = tasks_of(grads, block);
  const std::unique_ptr<bool[]> finite(new bool[tasks.size()]);
  grad_norm_bodies_table.pick().square_sums(tensors.data(), tasks.data(), static_cast<int64_t>(tasks.size()),
                                            block, sums, finite.get());
  return !std::all_of(finite.get(), finite.get() + tasks.size(), [](bool all) { return all; });
}

void sum_on_device(const Checker& check, const Views& grads, const std::vector<GradNormTensor>& tensors,
                   int64_t block, const StepNumber& scale, double* sums, const DeviceResult& result) {
  std::vector<int64_t> sizes;
  for (const TensorView& grad : grads) sizes.push_back(grad.numel());
  grad_norm_bodies_table.pick(check).sum({tensors.data(), sizes.data(), static_cast<int64_t>(grads.size()),
                                          block, square_blocks(grads, block), on_device(scale), sums,
                                          result});
}

}  // namespace

int64_t square_blocks(const Views& grads, int64_t block) {
  const Checker check("square_sums");
  if (block < 1) check.fail("block", std::to_string(block), "1 or more");
  int64_t count = 0;
  for (const TensorView& grad : grads) count += blocks_of(grad, block);
  return count;
}

std::pair<double, bool> grad_norm(const Views& grads, const StepNumber& grad_scale, const char* op,
                                  const StepResult& result) {
  const Checker check(op, grad_norm_bodies_table.device);
  const std::vector<GradNormTensor> tensors = checked_tensors(check, grads, grad_scale);
  check_result(check, result);
  if (grad_norm_bodies_table.on_device(check)) {
    std::pair<double, bool> here{};
    const bool given = result.norm.defined;
    sum_on_device(check, grads, tensors, kChunkElements, grad_scale, nullptr,
                  given ? on_device(result) : DeviceResult{&here.first, &here.second});
    return here;
  }
  std::vector<double> sums(static_cast<size_t>(square_blocks(grads, kChunkElements)));
  const bool found_inf = sum_squares(grads, tensors, kChunkElements, sums.data());
  double total = 0;
  for (const double sum : sums) total += sum;
  return give(result, std::sqrt(total) / grad_scale.value, found_inf);
}

bool square_sums(const Views& grads, int64_t block, const StepNumber& grad_scale, const TensorView& sums,
                 const TensorView& found_inf) {
  const Checker check("square_sums", grad_norm_bodies_table.device);
  const int64_t count = square_blocks(grads, block);
  const std::vector<GradNormTensor> tensors = checked_tensors(check, grads, grad_scale);
  check.output(sums, "out", {DType::f64});
  check.shape(sums, "out", {count});
  check.contiguous(sums, "out");
  if (found_inf || check.device() != Device::cpu) {
    check.output(found_inf, "found_inf", {DType::boolean});
    check_one_element(check, found_inf, "found_inf");
  }
  double* const out = sums.as<double>();
  bool found = false;
  if (grad_norm_bodies_table.on_device(check)) {
    sum_on_device(check, grads, tensors, block, grad_scale, out,
                  {nullptr, found_inf ? found_inf.as<bool>() : &found});
    return found;
  }
  found = sum_squares(grads, tensors, block, out);
  // One after the other: their product may leave the range of f64.
  const double scale = grad_scale.value;
  for (int64_t i = 0; i < count && scale != 1; ++i) out[i] = out[i] / scale / scale;
  if (found_inf) *found_inf.as<bool>() = found;
  return found;
}

}  // namespace gptcore
