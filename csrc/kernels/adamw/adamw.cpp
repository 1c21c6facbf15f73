#include "kernels/adamw/adamw.h"

#include <cmath>

#include "core/adam_options.h"
#include "core/isa.h"
#include "core/tensor_lists.h"
#include "kernels/adamw/adamw_body.h"

namespace gptcore {

GPTCORE_BODIES(AdamwBodies, adamw_bodies)

namespace {

std::vector<AdamwTensor> checked_tensors(const Checker& check, const AdamwLists& l) {
  std::vector<AdamwTensor> tensors(l.params.size());
  if (l.lows.empty()) {
    take_list(check, l.params, "params", l.params, &AdamwTensor::param, &tensors);
  } else {
    take_list(check, l.params, "params", l.params, &AdamwTensor::weight, &tensors);
    take_list(check, l.lows, "lows", l.params, &AdamwTensor::low, &tensors);
    if (!l.copies.empty()) {
      check.fail("copies", std::to_string(l.copies.size()) + " entries",
                 "None with lows, whose parameters are bf16");
    }
  }
  take_gradients(check, l.grads, l.params, l.weight_decay, &tensors);
  take_list(check, l.exp_avgs, "exp_avgs", l.params, &AdamwTensor::exp_avg, &tensors);
  take_list(check, l.exp_avg_sqs, "exp_avg_sqs", l.params, &AdamwTensor::exp_avg_sq, &tensors);
  if (!l.max_exp_avg_sqs.empty()) {
    take_list(check, l.max_exp_avg_sqs, "max_exp_avg_sqs", l.params, &AdamwTensor::max_exp_avg_sq, &tensors);
  }
  if (!l.copies.empty()) take_list(check, l.copies, "copies", l.params, &AdamwTensor::copy, &tensors);
  return tensors;
}

AdamwNumbers numbers_of(const AdamwOptions& o, double step, double norm) {
  const double clip = clip_factor(o.max_norm, norm);
  AdamwNumbers numbers;
  numbers.grad_factor = static_cast<float>(clip / (o.maximize ? -o.grad_scale.value : o.grad_scale.value));
  numbers.beta2 = static_cast<float>(o.beta2);
  numbers.rest1 = static_cast<float>(1.0 - o.beta1);
  numbers.rest2 = static_cast<float>(1.0 - o.beta2);
  numbers.step_size = static_cast<float>(o.lr.value / (1.0 - std::pow(o.beta1, step)));
  numbers.root_factor = static_cast<float>(1.0 / std::sqrt(1.0 - std::pow(o.beta2, step)));
  numbers.eps = static_cast<float>(o.eps);
  return numbers;
}

}  // namespace

std::pair<double, bool> adamw(const AdamwLists& lists, const AdamwOptions& o, const StepNumber& norm,
                              const StepResult& result) {
  const Checker check("adamw_", adamw_bodies_table.device);
  std::vector<AdamwTensor> tensors = checked_tensors(check, lists);
  check_adam_options(check, o, lists.steps.size());
  check_norm(check, norm);
  check_steps(check, lists.steps, lists.params.size());
  check_result(check, result);
  if (adamw_bodies_table.on_device(check)) {
    const std::vector<float*> counts = counts_of(lists.steps);
    adamw_bodies_table.pick(check).step(tensors.data(), sizes_of(lists.params).data(),
                                        lists.weight_decay.data(), static_cast<int64_t>(tensors.size()),
                                        o.decoupled, on_device(o, norm, counts, result));
    return {norm.value, !std::isfinite(norm.value)};
  }
  if (!std::isfinite(norm.value)) return give(result, norm.value, true);
  for (size_t i = 0; i < tensors.size(); ++i) {
    const double decay = lists.weight_decay[i];
    tensors[i].keep = o.decoupled ? static_cast<float>(1.0 - o.lr.value * decay) : 1.0f;
    tensors[i].l2 = o.decoupled ? 0.0f : static_cast<float>(decay);
  }
  const double step = step_of(check, o, lists.steps);
  const std::vector<Chunk> chunks = chunks_of(lists.params);
  adamw_bodies_table.pick(check).update(tensors.data(), chunks.data(), static_cast<int64_t>(chunks.size()),
                                        numbers_of(o, step, norm.value));
  write_steps(lists.steps, step);
  return give(result, norm.value, false);
}

}  // namespace gptcore
