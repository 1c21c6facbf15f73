// The phases of Adafactor over slices on CUDA. Passes over elements are those of whole tensors: blocks of rows are to them
// matrices of their own, which share columns' states.
#include <algorithm>

#include "core/cuda/scratch.h"
#include "kernels/adafactor/adafactor_block_sums.cuh"
#include "kernels/adafactor/adafactor_plan.cuh"
#include "kernels/adafactor/adafactor_squares.cuh"

namespace gptcore::cuda {
namespace {

// Items of all slices: factored ones whose rows are held, other factored ones, and flat ones.
struct SlicesPlan : AdafactorPlan {
  int64_t held_chunks = 0, factored_chunks = 0, factored_tasks = 0;
};

// The parts of slice i, one for each matrix of which there are rows. `own`: what this owner tells of blocks, `width`
// numbers each.
void add_matrices(const AdafactorPhase& phase, int64_t i, double* own, int64_t width, SlicesPlan* plan) {
  const SliceOf& s = phase.slices[i];
  const int64_t all = s.size / s.at.cols, first = s.at.start / s.at.cols;
  for (int64_t begin = 0; begin < all;) {
    const int64_t matrix = (first + begin) / s.at.rows;
    const int64_t rows = std::min(all - begin, s.at.rows - (first + begin) % s.at.rows);
    AdafactorTensor t = part_of(phase.tensors[i], begin * s.at.cols);
    t.row_var += begin, t.col_var += matrix * s.at.cols;
    t.slices = blocks(rows, s.at.block), t.rows = s.at.block, t.cols = s.at.cols;
    AdafactorItem& item = plan->add(t, true, i, rows - (t.slices - 1) * s.at.block);
    item.blocks = true;
    item.own = own;
    if (own) own += t.slices * width;
    if (phase.totals) {
      item.means = phase.totals[i] + matrix;
      item.update_sum = phase.totals[i] + s.matrices() + 1;
    }
    plan->tasks = item.first_task + t.slices * (1 + item.tiling.factor_cols);
    begin += rows;
  }
}

void add_flat(const AdafactorPhase& phase, int64_t i, double* own, SlicesPlan* plan) {
  AdafactorTensor t = phase.tensors[i];
  t.cols = phase.slices[i].size;
  AdafactorItem& item = plan->add(t, true, i, 1);
  item.own = own;
  plan->tasks = item.first_task + tiles_of(tiles_of(t.cols, kFlatBlock), kFlatWarps);
}

// `own`: for each slice where this owner's numbers of its blocks go; statistics, or one number a block.
SlicesPlan plan_of(const AdafactorPhase& phase, double* const* own, bool statistics) {
  SlicesPlan plan;
  for (const bool held : {true, false}) {
    for (int64_t i = 0; i < phase.count; ++i) {
      const SliceOf& s = phase.slices[i];
      if (s.factored && s.size && (s.at.cols <= kHeldCols) == held)
        add_matrices(phase, i, own ? own[i] : nullptr, statistics ? s.width() : 1, &plan);
    }
    if (held) plan.held_chunks = plan.chunks;
  }
  plan.factored_chunks = plan.chunks, plan.factored_tasks = plan.tasks;
  for (int64_t i = 0; i < phase.count; ++i) {
    if (!phase.slices[i].factored) add_flat(phase, i, own ? own[i] : nullptr, &plan);
  }
  return plan;
}

std::vector<AdafactorWhole> wholes_of(const AdafactorPhase& phase, int64_t* tasks) {
  std::vector<AdafactorWhole> wholes;
  *tasks = 0;
  for (int64_t i = 0; i < phase.count; ++i) {
    const SliceOf& s = phase.slices[i];
    AdafactorWhole whole{};
    whole.statistics = phase.statistics ? phase.statistics[i] : nullptr;
    whole.sums = phase.sums ? phase.sums[i] : nullptr;
    whole.totals = phase.totals[i], whole.col_var = phase.tensors[i].col_var;
    whole.decay = phase.step.weight_decay[i];
    whole.size = s.at.numel, whole.matrices = s.matrices(), whole.width = s.width();
    whole.factored = s.factored, whole.first_task = *tasks;
    if (!s.factored) {
      whole.blocks = s.all_blocks();
    } else if (whole.matrices) {
      whole.rows = s.at.rows, whole.cols = s.at.cols, whole.blocks = s.matrix_blocks();
      *tasks += whole.matrices * tiles_of(whole.cols, kFactorThreads);
    }
    wholes.push_back(whole);
  }
  return wholes;
}

constexpr int64_t kSumBytes = 32 * 8;

// What a phase has on the device, as long as its kernels are started.
class Phase {
 public:
  Phase(const AdafactorPhase& phase, double* const* own, bool statistics)
      : plan(plan_of(phase, own, statistics)),
        rates(rates_of(phase.step)),
        gradient{phase.step.scale, phase.step.norm, phase.step.max_norm, false},
        scratch_(bytes(phase)) {
    Layout layout(scratch_.as<char>());
    place(&layout, phase);
    upload(plan.items.data(), sums.count, const_cast<AdafactorItem*>(sums.items));
    upload(table_.data(), wholes.count, const_cast<AdafactorWhole*>(wholes.at));
    launch<&find_factor>({dim3(1), dim3(kSumThreads), kSumBytes}, sums, int64_t{0}, gradient, true,
                         DeviceResult{});
  }

  SlicesPlan plan;
  AdafactorRates rates;
  GradientRule gradient;
  AdafactorSums sums{};
  AdafactorWholes wholes{};
  int64_t column_tasks = 0;

 private:
  void place(Layout* layout, const AdafactorPhase& phase) {
    sums = lay_out(layout, &plan, phase.count);
    wholes = {layout->take<AdafactorWhole>(static_cast<int64_t>(table_.size())),
              static_cast<int>(table_.size()), layout->take<AdafactorPartial>(column_tasks)};
  }
  int64_t bytes(const AdafactorPhase& phase) {
    if (phase.totals) table_ = wholes_of(phase, &column_tasks);
    Layout measure(nullptr);
    place(&measure, phase);
    return measure.bytes();
  }

  std::vector<AdafactorWhole> table_;
  DeviceScratch scratch_;
};

void statistics(const AdafactorPhase& phase) {
  const Phase p(phase, phase.statistics, true);
  const bool params = p.rates.scale_parameter;
  const SlicesPlan& plan = p.plan;
  const dim3 tile(kTileThreads), states(kFactorThreads);
  launch<&adafactor_squares>({grid_of(plan.factored_chunks - plan.held_chunks), tile, kSquareBytes}, p.sums,
                             plan.held_chunks, params);
  launch<&adafactor_rows>({grid_of(plan.held_chunks), tile, kHeldBytes}, p.sums, int64_t{0}, p.rates,
                          p.gradient, params);
  launch<&block_statistics>({grid_of(plan.factored_tasks), states, kStateBytes}, p.sums, p.rates);
  launch<&flat_statistics>({grid_of(plan.tasks - plan.factored_tasks), states}, p.sums, plan.factored_tasks,
                           p.rates);
}

void updates(const AdafactorPhase& phase) {
  const Phase p(phase, phase.sums, false);
  const dim3 states(kFactorThreads);
  launch<&block_columns>({grid_of(p.column_tasks), states, kStateBytes}, p.sums, p.wholes, p.rates);
  launch<&block_totals>({grid_of(p.wholes.count), states, kStateBytes}, p.sums, p.wholes, p.rates);
  launch<&adafactor_updates<false>>({grid_of(p.plan.factored_chunks), dim3(kTileThreads), kUpdateBytes},
                                    p.sums, p.rates);
  launch<&block_updates>({grid_of(p.sums.count), states}, p.sums);
}

void apply(const AdafactorPhase& phase) {
  const Phase p(phase, nullptr, false);
  launch<&block_scales>({grid_of(p.wholes.count), dim3(kSumThreads), kSumBytes}, p.sums, p.wholes, p.rates);
  launch<&adafactor_updates<true>>({grid_of(p.plan.chunks), dim3(kTileThreads), kUpdateBytes}, p.sums,
                                   p.rates);
}

}  // namespace

GPTCORE_CUDA_BODIES(AdafactorBlocksBodies, adafactor_blocks_bodies) = {statistics, updates, apply};

}  // namespace gptcore::cuda
