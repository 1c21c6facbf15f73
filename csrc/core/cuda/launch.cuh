// Starting kernels, and what a block knows of itself beyond CUDA's own words. One of the headers that hold every
// instruction CUDA C++ has no word for; tests/simt has the same functions for the processor.
//
// House rules for kernels, which tests/simt relies on: shared memory is dynamic only, by shared_memory(); blocks wait
// for each other only within a cluster, or in an ordered launch for blocks before them; threads of a warp meet by
// __shfl, __syncwarp and the like with the mask of those who come.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <stdexcept>
#include <string>

#include "core/cuda/bodies.h"
#include "core/cuda/device.h"

namespace gptcore::cuda {

constexpr int kWarp = 32;
constexpr unsigned kFullMask = 0xffffffffu;

struct Launch {
  dim3 grid, block;
  int64_t shared_bytes = 0;
  int cluster = 1;       // blocks along x that share their shared memory; 1 below sm_90
  bool ordered = false;  // blocks may wait for blocks of lower index (x fastest), which start no later
};

inline void check_cuda(cudaError_t status, const char* what) {
  if (status == cudaSuccess) return;
  (void)cudaGetLastError();
  throw std::runtime_error(std::string("gptcore: CUDA: ") + what + ": " + cudaGetErrorString(status));
}

// On the device of the call at hand, as long as this lives.
class OnDevice {
 public:
  OnDevice() {
    check_cuda(cudaGetDevice(&before_), "cudaGetDevice");
    const int wanted = current_call().index;
    if (wanted != before_) check_cuda(cudaSetDevice(wanted), "cudaSetDevice");
    changed_ = wanted != before_;
  }
  ~OnDevice() {
    if (changed_) cudaSetDevice(before_);
  }
  OnDevice(const OnDevice&) = delete;
  OnDevice& operator=(const OnDevice&) = delete;

 private:
  int before_ = 0;
  bool changed_ = false;
};

inline cudaStream_t stream() { return static_cast<cudaStream_t>(current_call().stream); }

// Starts kernel(arguments...) on the caller's stream.
template <auto kernel, class... Arguments>
void launch(const Launch& l, const Arguments&... arguments) {
  if (l.grid.x == 0 || l.grid.y == 0 || l.grid.z == 0) return;
  const OnDevice on_device;
  if (l.shared_bytes > 48 << 10) {  // more than that is a block's on request only
    check_cuda(
        cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel),
                             cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(l.shared_bytes)),
        "shared memory");
  }
  cudaLaunchConfig_t config{};
  config.gridDim = l.grid, config.blockDim = l.block;
  config.dynamicSmemBytes = static_cast<size_t>(l.shared_bytes);
  config.stream = stream();
  cudaLaunchAttribute cluster{};
  if (l.cluster > 1) {
    cluster.id = cudaLaunchAttributeClusterDimension;
    cluster.val.clusterDim.x = static_cast<unsigned>(l.cluster);
    cluster.val.clusterDim.y = cluster.val.clusterDim.z = 1;
    config.attrs = &cluster, config.numAttrs = 1;
  }
  check_cuda(cudaLaunchKernelEx(&config, kernel, arguments...), "launch");
}

// Bytes set on the caller's stream.
inline void set_bytes(void* data, int value, int64_t bytes) {
  const OnDevice on_device;
  check_cuda(cudaMemsetAsync(data, value, static_cast<size_t>(bytes), stream()), "cudaMemsetAsync");
}

// The block's dynamic shared memory, at a multiple of 1,024 bytes, which swizzled copies want.
template <class T = unsigned char>
__device__ __forceinline__ T* shared_memory() {
  extern __shared__ __align__(1024) unsigned char shared_bytes[];
  return reinterpret_cast<T*>(shared_bytes);
}

// A generic pointer into shared memory as the 32-bit address that instructions take.
__device__ __forceinline__ uint32_t shared_address(const void* p) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(p));
}

__device__ __forceinline__ int lane() { return static_cast<int>(threadIdx.x) & (kWarp - 1); }
__device__ __forceinline__ int warp() { return static_cast<int>(threadIdx.x) / kWarp; }

// A barrier of `threads` threads of the block, a multiple of 32; id 1 to 15, __syncthreads() being 0.
__device__ __forceinline__ void named_barrier(int id, int threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
}
// The half of a barrier that does not wait.
__device__ __forceinline__ void named_barrier_arrive(int id, int threads) {
  asm volatile("bar.arrive %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

// --- across blocks ---------------------------------------------------------------------------------------------

// Waits until another block has made *flag at least `value` by signal(): one thread's business, with a barrier behind
// it for the others. What was written before the signal is then there to read.
__device__ __forceinline__ void wait_for(const int* flag, int value) {
  int seen;
  do {
    asm volatile("ld.global.acquire.gpu.b32 %0, [%1];" : "=r"(seen) : "l"(flag) : "memory");
  } while (seen < value);
}
// Adds one to *flag, behind a barrier after what the others shall see.
__device__ __forceinline__ void signal(int* flag) {
  __threadfence();
  asm volatile("red.global.release.gpu.add.s32 [%0], 1;" ::"l"(flag) : "memory");
}

// --- clusters, from sm_90 on -----------------------------------------------------------------------------------

__device__ __forceinline__ unsigned cluster_rank() {
#if __CUDA_ARCH__ >= 900
  unsigned rank;
  asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return rank;
#else
  return 0;
#endif
}

__device__ __forceinline__ void cluster_sync() {
#if __CUDA_ARCH__ >= 900
  asm volatile("barrier.cluster.arrive.release.aligned;\nbarrier.cluster.wait.acquire.aligned;" ::: "memory");
#else
  __syncthreads();
#endif
}

// The float that block `rank` of the cluster has where this one has `own`, in shared memory.
__device__ __forceinline__ float peer_float(const float* own, unsigned rank) {
#if __CUDA_ARCH__ >= 900
  uint32_t there;
  float value;
  asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(there) : "r"(shared_address(own)), "r"(rank));
  asm volatile("ld.shared::cluster.f32 %0, [%1];" : "=f"(value) : "r"(there) : "memory");
  return value;
#else
  return *own;
#endif
}

}  // namespace gptcore::cuda
