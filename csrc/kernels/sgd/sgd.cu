// SGD on CUDA: a block of threads for 8,192 elements of a tensor, one kernel for all forms.
#include "core/cuda/four.cuh"
#include "core/cuda/step_control.cuh"
#include "core/cuda/tensor_table.cuh"
#include "kernels/sgd/sgd_body.h"

namespace gptcore::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int64_t kChunk = 8192;

struct Entry {
  SgdTensor tensor;
  int64_t size;
  bool aligned;
};
using Table = TensorTable<Entry>;

struct Rule {
  GradientRule gradient;
  DeviceNumber lr;
  DeviceResult result;
  float momentum;
  bool nesterov, normed;  // normed: there is a norm, else nothing is looked at
};

// What a block's first thread works out for all of them.
struct Numbers {
  float grad_factor, lr;
  int skip;
};

template <bool whole>
__device__ __forceinline__ void update_four(const Entry& e, int64_t i, int64_t n, const Numbers& a,
                                            const Rule& rule) {
  const SgdTensor& t = e.tensor;
  const GradFour raw = load_grad<whole>(t.grad, t.bf16_grad, i, n);
  Four<float> p = load_four<whole>(t.param + i, n), b{};
  if (t.buffer && !t.first) b = load_four<whole>(t.buffer + i, n);
  const Four<float> grad = widened(raw, t.bf16_grad);
#pragma unroll
  for (int k = 0; k < 4; ++k) {
    float g = grad.at[k] * a.grad_factor;
    if (t.l2 != 0) g += p.at[k] * t.l2;  // an infinite parameter has no product with 0
    float u = g;
    if (t.buffer) {
      b.at[k] = b.at[k] * t.keep + g * t.share;
      u = rule.nesterov ? g + b.at[k] * rule.momentum : b.at[k];
    }
    p.at[k] -= u * a.lr;
  }
  if (t.buffer) store_four<whole>(t.buffer + i, b, n);
  store_four<whole>(t.param + i, p, n);
  if (t.copy) store_four<whole>(t.copy + i, rounded<bf16>(p), n);
}

__global__ void __launch_bounds__(kThreads, 4)
    update_chunks(const __grid_constant__ Table table, const __grid_constant__ Rule rule) {
  Numbers* const shared = shared_memory<Numbers>();
  if (threadIdx.x == 0) {
    const GradientFactor gradient = factor_of(rule.gradient);
    *shared = {static_cast<float>(gradient.factor), static_cast<float>(read_number(rule.lr)),
               rule.normed && gradient.skip};
    if (blockIdx.x == 0 && rule.normed) write_result(rule.result, read_number(rule.gradient.norm));
  }
  __syncthreads();
  const Numbers a = *shared;
  if (a.skip || table.count == 0) return;
  const int which = table.find(static_cast<int>(blockIdx.x));
  const Entry e = table.entries[which];
  const int64_t begin = (static_cast<int>(blockIdx.x) - table.first[which]) * kChunk;
  const int64_t end = e.size - begin < kChunk ? e.size : begin + kChunk;
  for (int64_t i = begin + int64_t{threadIdx.x} * 4; i < end; i += kThreads * 4) {
    e.aligned&& end - i >= 4 ? update_four<true>(e, i, end - i, a, rule)
                             : update_four<false>(e, i, end - i, a, rule);
  }
}

bool fits_fours(const SgdTensor& t) {
  return cuda::fits_fours(t.param) && cuda::fits_fours(t.buffer) && cuda::fits_fours(t.copy) &&
         (t.bf16_grad ? cuda::fits_fours(static_cast<const bf16*>(t.grad))
                      : cuda::fits_fours(static_cast<const float*>(t.grad)));
}

void step(const SgdTensor* tensors, const int64_t* sizes, int64_t count, const SgdStep& a) {
  const Rule rule = {
      {a.scale, a.norm, a.max_norm, a.maximize}, a.lr, a.result, a.momentum, a.nesterov, a.normed};
  const auto make = [&](int64_t i, Entry* entry) {
    *entry = {tensors[i], sizes[i], fits_fours(tensors[i])};
    return (sizes[i] + kChunk - 1) / kChunk;
  };
  bool started = false;
  const auto start = [&](const Table& table, unsigned blocks) {
    started = true;
    launch<&update_chunks>({dim3(blocks), dim3(kThreads), sizeof(Numbers)}, table, rule);
  };
  for_tables<Entry>(count, make, start);
  if (!started && a.normed) start(Table{}, 1);  // for the result, where no tensor has an element
}

}  // namespace

GPTCORE_CUDA_BODIES(SgdBodies, sgd_bodies) = {nullptr, step};

}  // namespace gptcore::cuda
