// What every phase of adafactor_blocks.cpp begins with: checks, and the way to another device.
#pragma once

#include <utility>
#include <vector>

#include "kernels/adafactor/adafactor_given.h"
#include "kernels/adafactor/adafactor_slices.h"

namespace gptcore {

GPTCORE_DEVICE_BODIES(AdafactorBlocksBodies, adafactor_blocks_bodies)

namespace {

using Views = std::vector<TensorView>;

struct Phase {
  const Checker check{"adafactor_blocks_", adafactor_blocks_bodies_table.device};
  const AdafactorSlices& call;
  const AdafactorGiven given;
  AdafactorOptions o;
  const AdafactorBodies& bodies = adafactor_bodies_table.pick();
  SlicePlan plan;
  std::vector<AdafactorTensor> tensors;  // one for each slice
  bool skips = false;                    // the norm is not finite
  double k = 1;
  std::vector<double> decays;
  AdafactorNumbers numbers;

  Phase(const AdafactorSlices& call, const AdafactorOptions& options)
      : call(call), given(call.given.value_or(given_of(options))) {
    o = known_options(options, given);
    if (!given.grad_norm) check.fail("grad_norm", "None", "the norm of all owners' gradients");
    tensors = checked_slices(check, call, &plan.slices);
    check_given(check, given, static_cast<int64_t>(tensors.size()),
                adafactor_blocks_bodies_table.on_device(check));
    skips = !std::isfinite(*o.grad_norm);  // by a tensor: plain numbers are checked
    if (skips) o.grad_norm = 0.0;
    check_options(check, o);
  }

  // Runs the phase where its tensors lie on another device, or there is nothing to do.
  template <class Body>
  bool is_done(Body AdafactorBlocksBodies::* body, const Views* statistics, const Views* totals,
               const Views* sums) const {
    const AdafactorBlocksBodies* device = adafactor_blocks_bodies_table.pick_device(check);
    if (!device) return skips;
    const auto pointers = [](const Views* views) {
      std::vector<double*> list;
      for (size_t i = 0; views && i < views->size(); ++i) list.push_back((*views)[i].as<double>());
      return list;
    };
    const std::vector<double*> s = pointers(statistics), t = pointers(totals), u = pointers(sums);
    const AdafactorStep step = on_device(o, given, call.weight_decay, {});
    (device->*body)({tensors.data(), plan.slices.data(), static_cast<int64_t>(tensors.size()), step,
                     statistics ? s.data() : nullptr, totals ? t.data() : nullptr,
                     sums ? u.data() : nullptr});
    return true;
  }

  // Cuts the slices for the processor's bodies.
  void cut_slices() {
    cut(tensors, &plan);
    k = factor_of(o, *o.grad_norm);
    numbers = numbers_of(o, k);
    for (double decay : call.weight_decay) decays.push_back(decay * given.decay_factor.value);
  }

  // A list of f64 (rows, width), or (width) where `rows` is null.
  template <class Rows>
  void take(const Views& list, const char* name, const Rows& rows, bool written) const {
    check.length(list.size(), name, plan.slices.size());
    for (size_t i = 0; i < list.size(); ++i) {
      const auto [count, width] = rows(plan.slices[i]);
      check_size(check, list, name, i, DType::f64, count * (width ? width : 1), width, written);
    }
  }
  void take_totals(const Views& list, bool written) const {
    take(list, "totals", [](const SliceOf& s) { return std::pair(s.matrices() + 2, int64_t{0}); }, written);
  }

  int64_t chunks() const { return static_cast<int64_t>(plan.chunks.size()); }
  const SliceOf& slice_of(const SliceBlock& block) const {
    return plan.slices[plan.parts[static_cast<size_t>(block.part)].slice];
  }
};

}  // namespace
}  // namespace gptcore
