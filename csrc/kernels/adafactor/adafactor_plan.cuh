// How a launcher of Adafactor on CUDA lines up tensors for its passes, and lays out their scratch memory.
#pragma once

#include <limits>
#include <vector>

#include "core/cuda/upload.cuh"
#include "kernels/adafactor/adafactor_items.cuh"

namespace gptcore::cuda {

// Lays out one block of scratch memory.
class Layout {
 public:
  explicit Layout(void* base) : at_(static_cast<char*>(base)), begin_(at_) {}
  template <class T>
  T* take(int64_t count) {
    T* const here = reinterpret_cast<T*>(at_);
    at_ += (count * static_cast<int64_t>(sizeof(T)) + 15) / 16 * 16;
    return here;
  }
  int64_t bytes() const { return at_ - begin_; }

 private:
  char *at_, *begin_;
};

inline bool fits_fours(const AdafactorTensor& t) {
  return fits_fours(t.param) && fits_fours(t.variance) && fits_fours(t.exp_avg) && fits_fours(t.copy) &&
         (t.bf16_grad ? fits_fours(static_cast<const bf16*>(t.grad))
                      : fits_fours(static_cast<const float*>(t.grad)));
}

// Tensors, whose chunks and tasks follow each other.
struct AdafactorPlan {
  std::vector<AdafactorItem> items;
  int64_t chunks = 0, tasks = 0;

  // `known`: the gradients' factor, before their squares.
  static bool is_held(const AdafactorTensor& t, bool known) {
    return t.row_var && known && t.cols <= kHeldCols;
  }

  AdafactorItem& add(const AdafactorTensor& t, bool known, int64_t number, int64_t last_rows) {
    const bool factored = t.row_var != nullptr, held = is_held(t, known);
    const AdafactorTiling tiling =
        held ? held_tiling_of(t.rows, t.cols) : tiling_of(t.rows, t.cols, factored);
    AdafactorItem item{};
    item.tensor = t, item.tiling = tiling;
    item.last_rows = last_rows;
    item.first_chunk = chunks, item.first_task = tasks;
    item.number = static_cast<int32_t>(number);
    item.aligned = fits_fours(t) && (!factored || t.cols % 4 == 0);
    item.held = held;
    items.push_back(item);
    if (t.slices * t.rows * t.cols == 0) return items.back();
    if (!factored) {
      chunks += tiling.col_blocks;
    } else {
      const int64_t above = (t.slices - 1) * tiling.row_blocks;
      chunks += (above + tiles_of(last_rows, tiling.rows)) * tiling.col_blocks;
      tasks += t.slices * (tiling.factor_rows + tiling.factor_cols);
    }
    return items.back();
  }
};

// Control, scales of `numbers` tensors, sums of chunks, and of items' rows and columns.
inline AdafactorSums lay_out(Layout* layout, AdafactorPlan* plan, int64_t numbers) {
  const auto count = static_cast<int64_t>(plan->items.size());
  AdafactorSums a{};
  a.items = layout->take<AdafactorItem>(count), a.count = static_cast<int>(count);
  a.grads = layout->take<double>(plan->chunks), a.params = layout->take<double>(plan->chunks);
  a.updates = layout->take<double>(plan->chunks);
  a.control = layout->take<AdafactorControl>(1), a.scales = layout->take<AdafactorScale>(numbers);
  for (AdafactorItem& item : plan->items) {
    AdafactorTensor& t = item.tensor;
    if (!t.row_var) continue;
    t.row_sums = layout->take<float>(t.slices * t.rows * item.tiling.col_blocks);
    t.col_sums = layout->take<float>(t.slices * t.cols * item.tiling.row_blocks);
    if (item.held) t.ratio_sums = layout->take<float>(t.slices * t.cols * item.tiling.row_blocks);
  }
  return a;
}

inline AdafactorRates rates_of(const AdafactorStep& s) {
  constexpr double none = std::numeric_limits<double>::infinity();
  return {s.step_size,
          s.beta2,
          s.decay_factor,
          s.each_step_size,
          s.each_beta2,
          s.eps_added ? s.eps1 : 0.0,
          s.eps_added ? 0.0 : s.eps1,
          s.eps2,
          s.clip_threshold,
          static_cast<float>(s.eps_added ? none : 1.0 / s.eps1),
          s.beta1,
          s.scale_parameter,
          s.scaled_decay,
          s.maximize};
}

inline dim3 grid_of(int64_t blocks) { return dim3(static_cast<unsigned>(blocks)); }

}  // namespace gptcore::cuda
