#include "fault_check.h"

#include <string>
#include <vector>

#include "core/cuda/launch.cuh"
#include "core/cuda/reduce.cuh"

namespace py = pybind11;

namespace gptcore::cuda {
namespace {

constexpr int kThreads = 64;

// Each thread reads its neighbour's number; without the barrier some read it too early.
template <bool barrier>
void neighbour(float* out) {
  float* room = shared_memory<float>();
  room[threadIdx.x] = static_cast<float>(threadIdx.x);
  if (barrier) __syncthreads();
  out[threadIdx.x] = room[(threadIdx.x + 1) % kThreads];
}

void past_the_end(float* out) {
  float* room = shared_memory<float>();
  room[threadIdx.x + 1] = 1.0f;
  __syncthreads();
  out[threadIdx.x] = room[threadIdx.x];
}

// One warp never comes to the barrier of both.
void deadlock(float* out) {
  if (warp() == 0) named_barrier(1, kThreads);
  out[threadIdx.x] = 0.0f;
}

// Half a warp shuffles with the whole.
void half_a_warp(float* out) { out[threadIdx.x] = lane() < 16 ? __shfl_xor_sync(kFullMask, 1.0f, 1) : 0.0f; }

void never_written(float* out) { out[threadIdx.x] = shared_memory<float>()[threadIdx.x]; }

std::vector<float> run(const std::string& kernel) {
  std::vector<float> out(kThreads, -1.0f);
  const Launch l{dim3(1), dim3(kThreads), kThreads * static_cast<int64_t>(sizeof(float))};
  if (kernel == "barrier") launch<&neighbour<true>>(l, out.data());
  if (kernel == "missing_barrier") launch<&neighbour<false>>(l, out.data());
  if (kernel == "past_the_end") launch<&past_the_end>(l, out.data());
  if (kernel == "deadlock") launch<&deadlock>(l, out.data());
  if (kernel == "half_a_warp") launch<&half_a_warp>(l, out.data());
  if (kernel == "never_written") launch<&never_written>(l, out.data());
  return out;
}

}  // namespace

void define_fault_check(py::module_& m) {
  m.def("fault_check", [](const std::string& kernel) {
    py::list values;
    for (const float value : run(kernel)) values.append(value);
    return values;
  });
}

}  // namespace gptcore::cuda
