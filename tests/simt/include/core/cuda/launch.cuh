// csrc/core/cuda/launch.cuh for the processor.
#pragma once

#include <cuda_runtime.h>

#include <stdexcept>
#include <tuple>

#include "core/cuda/bodies.h"
#include "core/cuda/device.h"

namespace gptcore::cuda {

constexpr int kWarp = 32;
constexpr unsigned kFullMask = 0xffffffffu;

struct Launch {
  dim3 grid, block;
  int64_t shared_bytes = 0;
  int cluster = 1;
  bool ordered = false;
};

template <auto kernel, class... Arguments>
void launch(const Launch& l, const Arguments&... arguments) {
  if (l.grid.x == 0 || l.grid.y == 0 || l.grid.z == 0) return;
  if (l.shared_bytes > limits().shared_bytes)
    throw std::runtime_error("simt: more shared memory than a block has");
  simt::last_kernel = __PRETTY_FUNCTION__;
  const auto body = [&] { kernel(arguments...); };
  simt::run(l.grid, l.block, l.shared_bytes, l.cluster, l.ordered, body);
}

inline void set_bytes(void* data, int value, int64_t bytes) {
  if (bytes > 0) std::memset(data, value, static_cast<size_t>(bytes));
}

template <class T = unsigned char>
inline T* shared_memory() {
  return reinterpret_cast<T*>(simt::current->block->shared);
}

inline uint32_t shared_address(const void* p) {
  const auto offset = static_cast<const unsigned char*>(p) - simt::current->block->shared;
  if (offset < 0 || offset >= simt::current->block->shared_bytes)
    simt::fail("an address outside shared memory");
  return static_cast<uint32_t>(offset);
}

inline int lane() { return static_cast<int>(simt::lane()); }
inline int warp() { return static_cast<int>(threadIdx.x) / kWarp; }

inline void named_barrier(int id, int threads) { simt::barrier(id, threads); }
inline void named_barrier_arrive(int id, int threads) { simt::barrier(id, threads, true); }

inline void wait_for(const int* flag, int value) {
  simt::wait_until([=] { return *flag >= value; });
}
inline void signal(int* flag) {
  ++*flag;
  simt::note_progress();
}

inline unsigned cluster_rank() { return simt::current->block->rank; }
inline void cluster_sync() { simt::cluster_barrier(); }
inline float peer_float(const float* own, unsigned rank) {
  const auto offset = reinterpret_cast<const unsigned char*>(own) - simt::current->block->shared;
  return *reinterpret_cast<const float*>(simt::grid.cluster[rank].shared + offset);
}

}  // namespace gptcore::cuda
