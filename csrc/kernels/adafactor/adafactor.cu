// Adafactor on CUDA: squares of g (and p), the states, squares of updates that do not follow from them, and the update,
// each over all tensors.
#include "core/cuda/scratch.h"
#include "kernels/adafactor/adafactor_plan.cuh"
#include "kernels/adafactor/adafactor_rows.cuh"
#include "kernels/adafactor/adafactor_scales.cuh"
#include "kernels/adafactor/adafactor_squares.cuh"
#include "kernels/adafactor/adafactor_states.cuh"
#include "kernels/adafactor/adafactor_updates.cuh"

namespace gptcore::cuda {
namespace {

// Tensors whose rows are held come first.
AdafactorPlan plan_of(const AdafactorTensor* tensors, int64_t count, const AdafactorStep& s, bool known,
                      int64_t* held_chunks) {
  AdafactorPlan plan;
  for (const bool held : {true, false}) {
    for (int64_t i = 0; i < count; ++i) {
      if (AdafactorPlan::is_held(tensors[i], known) != held) continue;
      AdafactorItem& item = plan.add(tensors[i], known, i, tensors[i].rows);
      item.decay = s.weight_decay[i];
      item.count = s.steps ? s.steps[i] : nullptr;
    }
    if (held) *held_chunks = plan.chunks;
  }
  return plan;
}

AdafactorSums lay_out_step(Layout* layout, AdafactorPlan* plan) {
  const auto count = static_cast<int64_t>(plan->items.size());
  const AdafactorSums a = lay_out(layout, plan, count);
  auto* const update_sums = layout->take<double>(count);
  auto* partials = layout->take<AdafactorPartial>(plan->tasks);
  for (int64_t i = 0; i < count; ++i) {
    AdafactorItem& item = plan->items[static_cast<size_t>(i)];
    item.update_sum = update_sums + i, item.partials = partials + item.first_task;
    if (item.tensor.row_var) item.means = layout->take<double>(item.tensor.slices);
  }
  return a;
}

void step(const AdafactorTensor* tensors, int64_t count, const AdafactorStep& s) {
  constexpr double none = std::numeric_limits<double>::infinity();
  const bool known = s.known || s.max_norm == none;
  int64_t held = 0;
  AdafactorPlan plan = plan_of(tensors, count, s, known, &held);
  Layout measure(nullptr);
  lay_out_step(&measure, &plan);
  const DeviceScratch scratch(measure.bytes());
  Layout layout(scratch.as<char>());
  const AdafactorSums a = lay_out_step(&layout, &plan);
  upload(plan.items.data(), count, const_cast<AdafactorItem*>(a.items));
  const AdafactorRates rates = rates_of(s);
  const GradientRule gradient = {s.scale, s.known ? s.norm : DeviceNumber{0.0}, s.max_norm, false};
  const dim3 threads(kTileThreads), chunks = grid_of(plan.chunks);
  constexpr int64_t sum_bytes = 32 * 8;
  launch<&adafactor_squares>({grid_of(plan.chunks - held), threads, kSquareBytes}, a, held,
                             s.scale_parameter);
  launch<&adafactor_rows>({grid_of(held), threads, kHeldBytes}, a, int64_t{0}, rates, gradient,
                          s.scale_parameter);
  launch<&find_factor>({dim3(1), dim3(kSumThreads), sum_bytes}, a, plan.chunks, gradient, s.known, s.result);
  launch<&adafactor_states>({grid_of(plan.tasks), dim3(kFactorThreads), kStateBytes}, a, rates);
  launch<&adafactor_means>({grid_of(count), dim3(kFactorThreads), sum_bytes}, a, rates);
  if (s.clip_threshold < none) launch<&adafactor_updates<false>>({chunks, threads, kUpdateBytes}, a, rates);
  launch<&find_scales>({grid_of(count), dim3(kSumThreads), sum_bytes}, a, plan.chunks, rates);
  launch<&adafactor_updates<true>>({chunks, threads, kUpdateBytes}, a, rates);
}

}  // namespace

GPTCORE_CUDA_BODIES(AdafactorBodies, adafactor_bodies) = {nullptr, nullptr, nullptr, nullptr, step};

}  // namespace gptcore::cuda
