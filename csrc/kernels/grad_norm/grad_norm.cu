// Sums of squares on CUDA: a block of threads, or one warp where blocks of elements are short, for each sum; then one
// block adds them up.
#include "core/cuda/four.cuh"
#include "core/cuda/scratch.h"
#include "core/cuda/step_control.cuh"
#include "core/cuda/tensor_table.cuh"
#include "kernels/grad_norm/grad_norm_body.h"

namespace gptcore::cuda {
namespace {

constexpr int kThreads = 256, kFinishThreads = 1024;
constexpr int64_t kWarpBlock = 4096;  // the longest block of elements for one warp

struct Entry {
  const void* data;
  int64_t size, first;  // first: the number of its first sum
  bool is_bf16, aligned;
};
using Table = TensorTable<Entry>;

// Which element is whose depends on its place in the block alone.
template <bool whole, class T>
__device__ __forceinline__ double sum_fours(const T* data, int64_t from, int64_t to, int64_t stride,
                                            int64_t size) {
  double sum = 0;
#pragma unroll 4
  for (int64_t i = from; i < to; i += stride) {
    sum += square_sum(widened(load_four<whole>(data + i, size - i)).at);
  }
  return sum;
}

template <class T>
__device__ __forceinline__ double sum_of(const Entry& t, int64_t begin, int64_t size, int member, int team) {
  const T* data = static_cast<const T*>(t.data) + begin;
  const int64_t from = member * 4, stride = team * 4;
  if (!t.aligned || begin % 4 != 0) return sum_fours<false>(data, from, size, stride, size);
  double sum = sum_fours<true>(data, from, size - 3, stride, size);
  const int64_t rest = size / 4 * 4;  // the last few, if they are this member's
  if (rest < size && rest % stride == from) sum += sum_fours<false>(data, rest, size, stride, size);
  return sum;
}

// `team` threads to a sum.
template <int team>
__global__ void __launch_bounds__(kThreads, 5)
    sum_blocks(const __grid_constant__ Table table, int64_t block, DeviceNumber scale, double* sums) {
  const int which = table.find(static_cast<int>(blockIdx.x));
  const Entry& t = table.entries[which];
  const int member = static_cast<int>(threadIdx.x) % team;
  const int64_t own = int64_t{static_cast<int>(blockIdx.x) - table.first[which]} * (kThreads / team) +
                      static_cast<int>(threadIdx.x) / team;
  const int64_t begin = own * block;
  const int64_t size = t.size - begin < block ? t.size - begin : block;
  double sum = 0;
  if (size > 0)
    sum =
        t.is_bf16 ? sum_of<bf16>(t, begin, size, member, team) : sum_of<float>(t, begin, size, member, team);
  sum = team == kWarp ? warp_sum(sum) : block_sum(sum, shared_memory<double>());
  const double s = read_number(scale);
  if (member == 0 && size > 0) sums[t.first + own] = sum / s / s;
}

__global__ void __launch_bounds__(kFinishThreads)
    finish(const double* sums, int64_t count, DeviceNumber scale, DeviceResult result) {
  double sum = 0;
#pragma unroll 4
  for (int64_t i = threadIdx.x; i < count; i += kFinishThreads) sum += sums[i];
  sum = block_sum(sum, shared_memory<double>());
  if (threadIdx.x == 0) write_result(result, sqrt(sum) / read_number(scale));
}

template <int team>
void start_sums(const GradNormStep& a, const DeviceNumber& scale, double* sums) {
  constexpr int64_t each = kThreads / team;
  int64_t first = 0;
  const auto make = [&](int64_t i, Entry* t) {
    const int64_t count = (a.sizes[i] + a.block - 1) / a.block;
    const GradNormTensor& tensor = a.tensors[i];
    const bool aligned = tensor.bf16 ? fits_fours(static_cast<const bf16*>(tensor.data))
                                     : fits_fours(static_cast<const float*>(tensor.data));
    *t = {tensor.data, a.sizes[i], first, tensor.bf16, aligned};
    first += count;
    return (count + each - 1) / each;
  };
  for_tables<Entry>(a.count, make, [&](const Table& table, unsigned blocks) {
    launch<&sum_blocks<team>>({dim3(blocks), dim3(kThreads), 32 * sizeof(double)}, table, a.block, scale,
                              sums);
  });
}

void sum(const GradNormStep& a) {
  const DeviceScratch scratch(a.sums ? 0 : a.blocks * static_cast<int64_t>(sizeof(double)));
  double* const sums = a.sums ? a.sums : scratch.as<double>();
  // Sums that somebody asked for are of scaled gradients, those of a norm are not.
  const DeviceNumber one{1.0}, &scale = a.sums ? a.scale : one;
  a.block <= kWarpBlock ? start_sums<kWarp>(a, scale, sums) : start_sums<kThreads>(a, scale, sums);
  launch<&finish>({dim3(1), dim3(kFinishThreads), 32 * sizeof(double)}, sums, a.blocks,
                  a.sums ? one : a.scale, a.result);
}

}  // namespace

GPTCORE_CUDA_BODIES(GradNormBodies, grad_norm_bodies) = {nullptr, sum};

}  // namespace gptcore::cuda
