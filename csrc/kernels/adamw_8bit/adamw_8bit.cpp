#include "kernels/adamw_8bit/adamw_8bit.h"

#include <cmath>

#include "core/adam_options.h"
#include "core/isa.h"
#include "core/tensor_lists.h"
#include "kernels/adamw_8bit/adamw_8bit_body.h"

namespace gptcore {

GPTCORE_BODIES(Adamw8bitBodies, adamw_8bit_bodies)

namespace {

static_assert(kChunkElements % kQuantBlock == 0);

using Views = std::vector<TensorView>;

// One f32 for each block of params[i].
void check_scales(const Checker& check, const Views& list, const char* name, size_t i,
                  const TensorView& param) {
  const int64_t count = (param.numel() + kQuantBlock - 1) / kQuantBlock;
  TensorView like = param;
  like.sizes = &count;
  like.strides = nullptr;
  like.ndim = 1;
  check.item(list, name, i, like, {DType::f32}, true);
}

// Chunks of a slice begin anywhere, so none may lie on both sides of a word group that needs the counter's second word.
constexpr int64_t kPlaces = int64_t{8} << 32;

void take_places(const Checker& check, const Adamw8bitLists& l, std::vector<Adamw8bitTensor>* tensors) {
  if (!l.places.empty()) check.length(l.places.size(), "places", l.params.size());
  for (size_t i = 0; i < tensors->size(); ++i) {
    Adamw8bitTensor& t = (*tensors)[i];
    t.number = static_cast<uint32_t>(i);
    if (l.places.empty()) continue;
    const auto [number, start] = l.places[i];
    t.number = static_cast<uint32_t>(number);
    t.start = start;
    const bool fits = start >= 0 && start % kQuantBlock == 0 && start <= kPlaces - l.params[i].numel();
    if (fits && number >= 0 && number >> 32 == 0) continue;
    check.fail(("places[" + std::to_string(i) + "]").c_str(),
               "(" + std::to_string(number) + ", " + std::to_string(start) + ")",
               "a number below 2^32 and a start that is a multiple of 256, all elements below 2^35");
  }
}

std::vector<Adamw8bitTensor> checked_tensors(const Checker& check, const Adamw8bitLists& l) {
  const size_t count = l.params.size();
  std::vector<Adamw8bitTensor> tensors(count);
  const bool low = count > 0 && l.params[0].dtype == DType::bf16;
  if (low && !l.copies.empty()) check.fail("copies", "a list", "None: the parameters are bf16 themselves");
  for (size_t i = 0; i < count; ++i) {
    check.item(l.params, "params", i, l.params[i], {low ? DType::bf16 : DType::f32}, true);
    tensors[i].param = l.params[i].data;
    tensors[i].bf16_param = low;
  }
  take_gradients(check, l.grads, l.params, l.weight_decay, &tensors);
  take_list(check, l.exp_avgs, "exp_avgs", l.params, &Adamw8bitTensor::exp_avg, &tensors);
  take_list(check, l.exp_avg_sqs, "exp_avg_sqs", l.params, &Adamw8bitTensor::exp_avg_sq, &tensors);
  if (!l.copies.empty()) take_list(check, l.copies, "copies", l.params, &Adamw8bitTensor::copy, &tensors);
  check.length(l.exp_avg_scales.size(), "exp_avg_scales", count);
  check.length(l.exp_avg_sq_scales.size(), "exp_avg_sq_scales", count);
  for (size_t i = 0; i < count; ++i) {
    check_scales(check, l.exp_avg_scales, "exp_avg_scales", i, l.params[i]);
    check_scales(check, l.exp_avg_sq_scales, "exp_avg_sq_scales", i, l.params[i]);
    tensors[i].exp_avg_scale = l.exp_avg_scales[i].as<float>();
    tensors[i].exp_avg_sq_scale = l.exp_avg_sq_scales[i].as<float>();
  }
  take_places(check, l, &tensors);
  return tensors;
}

Adamw8bitNumbers numbers_of(const Adamw8bitOptions& o, double step, double norm) {
  const double clip = clip_factor(o.max_norm, norm);
  const double factor = (o.maximize ? -clip : clip) / o.grad_scale.value;
  Adamw8bitNumbers numbers;
  numbers.beta1 = static_cast<float>(o.beta1);
  numbers.beta2 = static_cast<float>(o.beta2);
  numbers.mean_factor = static_cast<float>(factor * (1.0 - o.beta1));
  numbers.square_root = static_cast<float>(factor * std::sqrt(1.0 - o.beta2));
  numbers.step_size = static_cast<float>(o.lr.value / (1.0 - std::pow(o.beta1, step)));
  numbers.root_factor = static_cast<float>(1.0 / std::sqrt(1.0 - std::pow(o.beta2, step)));
  numbers.eps = static_cast<float>(o.eps);
  numbers.seed = o.seed;
  numbers.step = static_cast<uint32_t>(step);
  return numbers;
}

}  // namespace

std::pair<double, bool> adamw_8bit(const Adamw8bitLists& lists, const Adamw8bitOptions& o,
                                   const StepNumber& norm, const StepResult& result) {
  const Checker check("adamw_8bit_", adamw_8bit_bodies_table.device);
  std::vector<Adamw8bitTensor> tensors = checked_tensors(check, lists);
  check_adam_options(check, o, lists.steps.size());
  check_norm(check, norm);
  check_steps(check, lists.steps, lists.params.size());
  check_result(check, result);
  const auto count = static_cast<int64_t>(tensors.size());
  if (adamw_8bit_bodies_table.on_device(check)) {
    const std::vector<float*> counts = counts_of(lists.steps);
    adamw_8bit_bodies_table.pick(check).step(tensors.data(), sizes_of(lists.params).data(),
                                             lists.weight_decay.data(), count, o.seed,
                                             on_device(o, norm, counts, result));
    return {norm.value, !std::isfinite(norm.value)};
  }
  if (!std::isfinite(norm.value)) return give(result, norm.value, true);
  for (size_t i = 0; i < tensors.size(); ++i) {
    tensors[i].keep = static_cast<float>(1.0 - o.lr.value * lists.weight_decay[i]);
  }
  const double step = step_of(check, o, lists.steps);
  const std::vector<Chunk> chunks = chunks_of(lists.params);
  adamw_8bit_bodies_table.pick(check).update(
      tensors.data(), chunks.data(), static_cast<int64_t>(chunks.size()), numbers_of(o, step, norm.value));
  write_steps(lists.steps, step);
  return give(result, norm.value, false);
}

}  // namespace gptcore
