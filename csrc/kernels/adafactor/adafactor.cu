// Adafactor on CUDA: squares of g (and p), the states, squares of the updates, and the update, each over all tensors.
#include <limits>
#include <vector>

#include "core/cuda/scratch.h"
#include "core/cuda/upload.cuh"
#include "kernels/adafactor/adafactor_passes.cuh"

namespace gptcore::cuda {
namespace {

constexpr int kSumThreads = 256;

// The sum of sums[begin .. end - 1], by the block's threads.
__device__ __forceinline__ double sum_of(const double* sums, int64_t begin, int64_t end, double* room) {
  double sum = 0;
  for (int64_t i = begin + threadIdx.x; i < end; i += kSumThreads) sum += sums[i];
  return block_sum(sum, room);
}

// The norm, where nobody has told it, and the gradients' factor.
__global__ void __launch_bounds__(kSumThreads)
    find_factor(AdafactorSums a, int64_t chunks, GradientRule rule, bool known, DeviceResult result) {
  const double total = sum_of(a.grads, 0, chunks, shared_memory<double>());
  if (threadIdx.x != 0) return;
  if (!known) rule.norm = {sqrt(total) / read_number(rule.scale)};
  const GradientFactor gradient = factor_of(rule);
  *a.control = {gradient.factor, gradient.skip};
  write_result(result, read_number(rule.norm));
}

// A block for each tensor: what its RMS(p) and RMS(U) make of the step, and its count.
__global__ void __launch_bounds__(kSumThreads)
    find_scales(AdafactorSums a, int64_t chunks, const __grid_constant__ AdafactorRates rates) {
  if (a.control->skip) return;
  double* const room = shared_memory<double>();
  const auto which = static_cast<int>(blockIdx.x);
  const AdafactorItem& item = a.items[which];
  const AdafactorTensor& t = item.tensor;
  const int64_t begin = item.first_chunk, end = which + 1 < a.count ? a.items[which + 1].first_chunk : chunks;
  const double size = static_cast<double>(t.slices * t.rows * t.cols);
  const bool clips = rates.clip_threshold < INFINITY;
  const double params = rates.scale_parameter ? sum_of(a.params, begin, end, room) : 0.0;
  __syncthreads();
  const double updates = clips ? sum_of(a.updates, begin, end, room) : 0.0;
  if (threadIdx.x != 0) return;
  double step = read_each(rates.step_size, rates.each_step_size, item.number);
  if (rates.scale_parameter) step *= fmax(rates.eps2, sqrt(params / size));
  const double decay = item.decay * read_number(rates.decay_factor) * (rates.scaled_decay ? step : 1.0);
  const double k = a.control->factor;
  if (clips) step /= fmax(1.0, k * sqrt(updates / size) / rates.clip_threshold);
  a.scales[item.number] = {static_cast<float>(1.0 - decay),
                           static_cast<float>((rates.maximize ? -step : step) * k)};
  if (item.count) *item.count += 1.0f;
}

bool fits_fours(const AdafactorTensor& t) {
  return cuda::fits_fours(t.param) && cuda::fits_fours(t.variance) && cuda::fits_fours(t.exp_avg) &&
         cuda::fits_fours(t.copy) &&
         (t.bf16_grad ? cuda::fits_fours(static_cast<const bf16*>(t.grad))
                      : cuda::fits_fours(static_cast<const float*>(t.grad)));
}

// The tensors' items, and how much scratch they take.
struct Plan {
  std::vector<AdafactorItem> items;
  int64_t chunks = 0, tasks = 0, floats = 0, means = 0;
};

Plan plan_of(const AdafactorTensor* tensors, int64_t count, const AdafactorStep& a) {
  Plan plan;
  for (int64_t i = 0; i < count; ++i) {
    const AdafactorTensor& t = tensors[i];
    const bool factored = t.row_var != nullptr, empty = t.slices * t.rows * t.cols == 0;
    const AdafactorTiling tiling = tiling_of(t.rows, t.cols, factored);
    AdafactorItem item{t,
                       tiling,
                       a.weight_decay[i],
                       a.steps ? a.steps[i] : nullptr,
                       nullptr,
                       plan.chunks,
                       plan.tasks,
                       static_cast<int32_t>(i),
                       fits_fours(t) && (!factored || t.cols % 4 == 0)};
    plan.items.push_back(item);
    if (empty) continue;
    plan.chunks += factored ? t.slices * tiling.row_blocks * tiling.col_blocks : tiling.col_blocks;
    if (!factored) continue;
    plan.tasks += t.slices * (tiling.factor_rows + tiling.factor_cols);
    plan.means += t.slices * tiling.factor_rows;
    plan.floats += t.slices * (t.rows * tiling.col_blocks + t.cols * tiling.row_blocks);
  }
  return plan;
}

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

AdafactorSums lay_out(Layout* layout, Plan* plan) {
  const auto count = static_cast<int64_t>(plan->items.size());
  AdafactorSums a{};
  a.items = layout->take<AdafactorItem>(count), a.count = static_cast<int>(count);
  a.grads = layout->take<double>(plan->chunks), a.params = layout->take<double>(plan->chunks);
  a.updates = layout->take<double>(plan->chunks);
  a.control = layout->take<AdafactorControl>(1), a.scales = layout->take<AdafactorScale>(count);
  auto* means = layout->take<double>(plan->means);
  auto* floats = layout->take<float>(plan->floats);
  for (AdafactorItem& item : plan->items) {
    AdafactorTensor& t = item.tensor;
    if (!t.row_var || t.slices * t.rows * t.cols == 0) continue;
    item.row_means = means, t.row_sums = floats;
    means += t.slices * item.tiling.factor_rows;
    t.col_sums = floats + t.slices * t.rows * item.tiling.col_blocks;
    floats = t.col_sums + t.slices * t.cols * item.tiling.row_blocks;
  }
  return a;
}

void step(const AdafactorTensor* tensors, int64_t count, const AdafactorStep& s) {
  Plan plan = plan_of(tensors, count, s);
  Layout measure(nullptr);
  lay_out(&measure, &plan);
  const DeviceScratch scratch(measure.bytes());
  Layout layout(scratch.as<char>());
  const AdafactorSums a = lay_out(&layout, &plan);
  upload(plan.items.data(), count, const_cast<AdafactorItem*>(a.items));
  constexpr double none = std::numeric_limits<double>::infinity();
  const AdafactorRates rates = {s.step_size,
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
  const dim3 chunks(static_cast<unsigned>(plan.chunks)), threads(kTileThreads);
  launch<&adafactor_squares>({chunks, threads, kSquareBytes}, a, s.scale_parameter);
  launch<&find_factor>({dim3(1), dim3(kSumThreads), 32 * 8}, a, plan.chunks,
                       GradientRule{s.scale, s.norm, s.max_norm, false}, s.known, s.result);
  launch<&adafactor_states>({dim3(static_cast<unsigned>(plan.tasks)), dim3(kFactorThreads), 32 * 8}, a,
                            rates);
  if (s.clip_threshold < none) launch<&adafactor_updates<false>>({chunks, threads, kUpdateBytes}, a, rates);
  launch<&find_scales>({dim3(static_cast<unsigned>(count)), dim3(kSumThreads), 32 * 8}, a, plan.chunks,
                       rates);
  launch<&adafactor_updates<true>>({chunks, threads, kUpdateBytes}, a, rates);
}

}  // namespace

GPTCORE_CUDA_BODIES(AdafactorBodies, adafactor_bodies) = {nullptr, nullptr, nullptr, nullptr, step};

}  // namespace gptcore::cuda
