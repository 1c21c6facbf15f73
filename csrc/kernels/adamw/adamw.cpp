#include "kernels/adamw/adamw.h"

#include <cmath>

#include "core/isa.h"
#include "core/optimizer.h"
#include "core/tensor_lists.h"
#include "kernels/adamw/adamw_body.h"

namespace gptcore {

GPTCORE_BODIES(AdamwBodies, adamw_bodies)

namespace {

void check_steps(const Checker& check, const std::vector<TensorView>& steps, size_t expected) {
  if (!steps.empty()) check.length(steps.size(), "steps", expected);
  for (size_t i = 0; i < steps.size(); ++i) {
    const TensorView& step = steps[i];
    if (step.defined && step.device == Device::cpu && step.dtype == DType::f32 && step.numel() == 1 &&
        !step.readonly) {
      continue;
    }
    const std::string name = "steps[" + std::to_string(i) + "]";
    check.output(step, name.c_str(), {DType::f32});
    check.fail(name.c_str(), describe(step), "one element");
  }
}

std::vector<AdamwTensor> checked_tensors(const Checker& check, const AdamwLists& l, const AdamwOptions& o) {
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
  for (size_t i = 0; i < tensors.size(); ++i) {
    const double decay = l.weight_decay[i];
    tensors[i].keep = o.decoupled ? static_cast<float>(1.0 - o.lr * decay) : 1.0f;
    tensors[i].l2 = o.decoupled ? 0.0f : static_cast<float>(decay);
  }
  return tensors;
}

}  // namespace

void adamw(const AdamwLists& lists, const AdamwOptions& o, double norm) {
  const Checker check("adamw_");
  check_adam_options(check, o);
  check.number(norm >= 0 && std::isfinite(norm), "grad_norm", norm, "a finite number, 0 or more");
  const std::vector<AdamwTensor> tensors = checked_tensors(check, lists, o);
  check_steps(check, lists.steps, lists.params.size());
  const std::vector<Chunk> chunks = chunks_of(lists.params);

  const double clip = clip_factor(o.max_norm, norm);
  const double scale = o.maximize ? -o.grad_scale : o.grad_scale;
  AdamwNumbers numbers;
  numbers.grad_factor = static_cast<float>(clip / scale);
  numbers.beta2 = static_cast<float>(o.beta2);
  numbers.rest1 = static_cast<float>(1.0 - o.beta1);
  numbers.rest2 = static_cast<float>(1.0 - o.beta2);
  const double step = static_cast<double>(o.step);
  numbers.step_size = static_cast<float>(o.lr / (1.0 - std::pow(o.beta1, step)));
  numbers.root_factor = static_cast<float>(1.0 / std::sqrt(1.0 - std::pow(o.beta2, step)));
  numbers.eps = static_cast<float>(o.eps);
  adamw_bodies_table.pick(check).update(tensors.data(), chunks.data(), static_cast<int64_t>(chunks.size()),
                                        numbers);
  for (const TensorView& view : lists.steps) *view.as<float>() = static_cast<float>(o.step);
}

}  // namespace gptcore
