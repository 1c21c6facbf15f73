#include "kernels/sgd/sgd.h"

#include <cmath>
#include <limits>

#include "core/isa.h"
#include "core/optimizer.h"
#include "core/tensor_lists.h"
#include "kernels/sgd/sgd_body.h"

namespace gptcore {

GPTCORE_BODIES(SgdBodies, sgd_bodies)

namespace {

void check_options(const Checker& check, const SgdOptions& o) {
  check_step_number(check, o.lr, "lr");
  check_not_negative(check, o.lr, "lr");
  check.number(o.momentum >= 0 && std::isfinite(o.momentum), "momentum", o.momentum,
               "a finite number, 0 or more");
  check.number(o.dampening >= 0 && o.dampening <= 1, "dampening", o.dampening, "a number in [0, 1]");
  if (o.nesterov && (o.momentum == 0 || o.dampening != 0)) {
    check.fail("nesterov", "True", "a momentum above 0 and dampening 0 with it");
  }
  check_step_number(check, o.grad_scale, "grad_scale");
  check_positive(check, o.grad_scale, "grad_scale");
  check_clip(check, o.max_norm);
}

std::vector<SgdTensor> checked_tensors(const Checker& check, const SgdLists& l, const SgdOptions& o) {
  std::vector<SgdTensor> tensors(l.params.size());
  take_list(check, l.params, "params", l.params, &SgdTensor::param, &tensors);
  take_gradients(check, l.grads, l.params, l.weight_decay, &tensors);
  if (!l.copies.empty()) take_list(check, l.copies, "copies", l.params, &SgdTensor::copy, &tensors);
  const bool buffered = !l.momentum_buffers.empty();
  if (buffered) {
    take_list(check, l.momentum_buffers, "momentum_buffers", l.params, &SgdTensor::buffer, &tensors);
    check.length(l.first.size(), "first", l.params.size());
  } else if (o.momentum != 0 && !l.params.empty()) {
    check.fail("momentum", std::to_string(o.momentum), "0 without momentum_buffers");
  }
  for (size_t i = 0; i < tensors.size(); ++i) {
    SgdTensor& tensor = tensors[i];
    tensor.l2 = static_cast<float>(l.weight_decay[i]);
    tensor.first = buffered && l.first[i];
    tensor.keep = tensor.first ? 0.0f : static_cast<float>(o.momentum);
    tensor.share = tensor.first ? 1.0f : static_cast<float>(1.0 - o.dampening);
  }
  return tensors;
}

SgdStep on_device(const SgdOptions& o, const std::optional<StepNumber>& norm, const StepResult& result) {
  SgdStep a{};
  a.lr = on_device(o.lr), a.scale = on_device(o.grad_scale);
  a.normed = norm.has_value();
  if (norm) a.norm = on_device(*norm), a.result = on_device(result, *norm);
  a.max_norm = o.max_norm.value_or(std::numeric_limits<double>::infinity());
  a.momentum = static_cast<float>(o.momentum), a.nesterov = o.nesterov, a.maximize = o.maximize;
  return a;
}

}  // namespace

std::pair<double, bool> sgd(const SgdLists& lists, const SgdOptions& o, const std::optional<StepNumber>& norm,
                            const StepResult& result) {
  const Checker check("sgd_", sgd_bodies_table.device);
  const std::vector<SgdTensor> tensors = checked_tensors(check, lists, o);
  check_options(check, o);
  if (norm) check_norm(check, *norm);
  if (norm) check_result(check, result);
  const double value = norm ? norm->value : 0.0;
  if (sgd_bodies_table.on_device(check)) {
    sgd_bodies_table.pick(check).step(tensors.data(), sizes_of(lists.params).data(),
                                      static_cast<int64_t>(tensors.size()), on_device(o, norm, result));
    return {value, !std::isfinite(value)};
  }
  if (!std::isfinite(value)) return give(result, value, true);
  const std::vector<Chunk> chunks = chunks_of(lists.params);
  const double scale = o.maximize ? -o.grad_scale.value : o.grad_scale.value;
  const SgdNumbers numbers = {static_cast<float>(clip_factor(o.max_norm, value) / scale),
                              static_cast<float>(o.lr.value), static_cast<float>(o.momentum), o.nesterov};
  sgd_bodies_table.pick(check).update(tensors.data(), chunks.data(), static_cast<int64_t>(chunks.size()),
                                      numbers);
  return norm ? give(result, value, false) : std::pair(value, false);
}

}  // namespace gptcore
