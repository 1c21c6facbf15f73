#include "kernels/sgd/sgd.h"

#include <cmath>

#include "core/isa.h"
#include "core/optimizer.h"
#include "core/tensor_lists.h"
#include "kernels/sgd/sgd_body.h"

namespace gptcore {

GPTCORE_BODIES(SgdBodies, sgd_bodies)

namespace {

void check_options(const Checker& check, const SgdOptions& o) {
  check.number(o.lr >= 0 && std::isfinite(o.lr), "lr", o.lr, "a finite number, 0 or more");
  check.number(o.momentum >= 0 && std::isfinite(o.momentum), "momentum", o.momentum,
               "a finite number, 0 or more");
  check.number(o.dampening >= 0 && o.dampening <= 1, "dampening", o.dampening, "a number in [0, 1]");
  if (o.nesterov && (o.momentum == 0 || o.dampening != 0)) {
    check.fail("nesterov", "True", "a momentum above 0 and dampening 0 with it");
  }
  check.number(o.grad_scale > 0 && std::isfinite(o.grad_scale), "grad_scale", o.grad_scale,
               "a finite number above 0");
  if (o.max_norm) check.number(*o.max_norm > 0, "max_norm", *o.max_norm, "a number above 0, or None");
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

}  // namespace

void sgd(const SgdLists& lists, const SgdOptions& o, double norm) {
  const Checker check("sgd_");
  check_options(check, o);
  if (o.max_norm) {
    check.number(norm >= 0 && std::isfinite(norm), "grad_norm", norm, "a finite number, 0 or more");
  }
  const std::vector<SgdTensor> tensors = checked_tensors(check, lists, o);
  const std::vector<Chunk> chunks = chunks_of(lists.params);
  const double clip = clip_factor(o.max_norm, norm);
  const double scale = o.maximize ? -o.grad_scale : o.grad_scale;
  const SgdNumbers numbers = {static_cast<float>(clip / scale), static_cast<float>(o.lr),
                              static_cast<float>(o.momentum), o.nesterov};
  sgd_bodies_table.pick(check).update(tensors.data(), chunks.data(), static_cast<int64_t>(chunks.size()),
                                      numbers);
}

}  // namespace gptcore
