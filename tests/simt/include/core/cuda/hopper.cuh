// csrc/core/cuda/hopper.cuh for the processor. Loads come when nobody else can go on, stores when they are waited for.
#pragma once

#include <cuda_runtime.h>

#include <array>
#include <string>

#include "core/cuda/launch.cuh"
#include "core/cuda/tensor_map.h"
#include "simt_tensor_map.h"

namespace gptcore::cuda {

constexpr int kWarpgroup = 128;

inline int warpgroup() { return static_cast<int>(threadIdx.x) / kWarpgroup; }

inline bool elect_one() {
  __syncwarp();
  return lane() == 0;
}

template <int kRegisters>
inline void keep_registers() {
  static_assert(kRegisters % 8 == 0 && kRegisters >= 24 && kRegisters <= 256);
  __syncwarp();
}
template <int kRegisters>
inline void take_registers() {
  keep_registers<kRegisters>();
}

// --- barriers in shared memory ---------------------------------------------------------------------------------

struct SimtMbarrier {
  static constexpr unsigned kReady = 0x55;  // what is written over shared memory's NaNs
  int64_t bytes : 32;
  uint64_t missing : 12, arrivals : 12, phase : 1, ready : 7;

  void step() {
    if (missing == 0 && bytes == 0) missing = arrivals, phase ^= 1;
  }
};
static_assert(sizeof(SimtMbarrier) == sizeof(uint64_t));

inline SimtMbarrier* simt_mbarrier(uint64_t* barrier) {
  if (shared_address(barrier) % 8 != 0) simt::fail("an mbarrier at an address that is no multiple of 8");
  auto* b = reinterpret_cast<SimtMbarrier*>(barrier);
  if (b->ready != SimtMbarrier::kReady) simt::fail("an mbarrier that nobody initialised");
  return b;
}

inline void mbarrier_init(uint64_t* barrier, unsigned arrivals) {
  shared_address(barrier);
  SimtMbarrier b{};
  b.missing = b.arrivals = arrivals & 0xfffu, b.ready = SimtMbarrier::kReady;
  std::memcpy(barrier, &b, sizeof(b));
}
inline void mbarrier_init_fence() {}
inline void mbarrier_arrive_expecting(uint64_t* barrier, unsigned bytes) {
  SimtMbarrier* b = simt_mbarrier(barrier);
  if (b->missing == 0) simt::fail("more arrivals at an mbarrier than it counts");
  b->bytes += bytes;
  b->missing -= 1;
  b->step();
  simt::note_progress();
}
inline void mbarrier_arrive(uint64_t* barrier) { mbarrier_arrive_expecting(barrier, 0); }
inline void mbarrier_wait(uint64_t* barrier, unsigned parity) {
  const SimtMbarrier* b = simt_mbarrier(barrier);
  simt::wait_until([=] { return b->phase != (parity & 1); });
}

inline void async_proxy_fence() {}
inline void async_proxy_fence_global() {}

// --- the copy engine -------------------------------------------------------------------------------------------

inline void simt_expect_shared(const void* p, uint32_t multiple, int64_t bytes) {
  const uint32_t at = shared_address(p);
  if (at % multiple != 0) simt::fail("a shared address that is no multiple of " + std::to_string(multiple));
  if (at + bytes > simt::current->block->shared_bytes) simt::fail("a copy past the end of shared memory");
}

template <size_t rank>
inline SimtBoxes simt_boxes(const TensorMap& map, const void* shared, const int (&c)[rank]) {
  const SimtBoxes boxes(map);
  if (boxes.rank != static_cast<int>(rank)) simt::fail("coordinates of another rank than the tensor map's");
  if (c[0] * boxes.element % 16 != 0) simt::fail("an innermost coordinate that is no multiple of 16 bytes");
  simt_expect_shared(shared, boxes.swizzle ? static_cast<uint32_t>(8 * boxes.swizzle) : 128, boxes.bytes());
  return boxes;
}

template <size_t rank>
inline void simt_load_box(void* to, const TensorMap& map, uint64_t* barrier, const int (&c)[rank]) {
  const SimtBoxes boxes = simt_boxes(map, to, c);
  SimtMbarrier* b = simt_mbarrier(barrier);
  const std::array<int, 5> at = simt_coordinates(c);
  unsigned char* shared = simt::current->block->shared;
  const int64_t offset = shared_address(to);
  simt::later([=] {
    boxes.each_chunk(at, offset, [=](int64_t chunk, unsigned char* global, int bytes) {
      std::memset(shared + chunk, 0, 16);
      if (bytes > 0) std::memcpy(shared + chunk, global, static_cast<size_t>(bytes));
    });
    b->bytes -= boxes.bytes();
    b->step();
  });
}
template <size_t rank>
inline void simt_store_box(const TensorMap& map, const void* from, const int (&c)[rank]) {
  const SimtBoxes boxes = simt_boxes(map, from, c);
  const std::array<int, 5> at = simt_coordinates(c);
  const unsigned char* shared = simt::current->block->shared;
  const int64_t offset = shared_address(from);
  simt::current->stores.open.push_back([=] {
    boxes.each_chunk(at, offset, [=](int64_t chunk, unsigned char* global, int bytes) {
      if (bytes > 0) std::memcpy(global, shared + chunk, static_cast<size_t>(bytes));
    });
  });
}

inline void prefetch(const TensorMap&) {}

inline void tma_load(void* to, const TensorMap& map, uint64_t* barrier, int c0, int c1) {
  simt_load_box(to, map, barrier, {c0, c1});
}
inline void tma_load(void* to, const TensorMap& map, uint64_t* barrier, int c0, int c1, int c2) {
  simt_load_box(to, map, barrier, {c0, c1, c2});
}
inline void tma_load(void* to, const TensorMap& map, uint64_t* barrier, int c0, int c1, int c2, int c3) {
  simt_load_box(to, map, barrier, {c0, c1, c2, c3});
}
inline void tma_load(void* to, const TensorMap& map, uint64_t* barrier, int c0, int c1, int c2, int c3,
                     int c4) {
  simt_load_box(to, map, barrier, {c0, c1, c2, c3, c4});
}
inline void tma_store(const TensorMap& map, const void* from, int c0, int c1) {
  simt_store_box(map, from, {c0, c1});
}
inline void tma_store(const TensorMap& map, const void* from, int c0, int c1, int c2) {
  simt_store_box(map, from, {c0, c1, c2});
}
inline void tma_store(const TensorMap& map, const void* from, int c0, int c1, int c2, int c3) {
  simt_store_box(map, from, {c0, c1, c2, c3});
}
inline void tma_store(const TensorMap& map, const void* from, int c0, int c1, int c2, int c3, int c4) {
  simt_store_box(map, from, {c0, c1, c2, c3, c4});
}

inline void simt_expect_run(const void* shared, const void* global, unsigned bytes) {
  if (bytes % 16 != 0 || reinterpret_cast<uintptr_t>(global) % 16 != 0)
    simt::fail("a bulk copy of an address or length that is no multiple of 16");
  simt_expect_shared(shared, 16, bytes);
}
inline void bulk_load(void* to, const void* from, unsigned bytes, uint64_t* barrier) {
  simt_expect_run(to, from, bytes);
  SimtMbarrier* b = simt_mbarrier(barrier);
  simt::later([=] {
    std::memcpy(to, from, bytes);
    b->bytes -= bytes;
    b->step();
  });
}
inline void bulk_store(void* to, const void* from, unsigned bytes) {
  simt_expect_run(from, to, bytes);
  simt::current->stores.open.push_back([=] { std::memcpy(to, from, bytes); });
}
inline void bulk_add(float* to, const float* from, unsigned bytes) {
  simt_expect_run(from, to, bytes);
  simt::current->stores.open.push_back([=] {
    for (unsigned i = 0; i < bytes / sizeof(float); ++i) to[i] += from[i];
  });
}

inline void bulk_commit() { simt::current->stores.commit(); }
template <int kLeft>
inline void bulk_wait_read() {
  simt::current->stores.wait(kLeft);
}
template <int kLeft>
inline void bulk_wait() {
  simt::current->stores.wait(kLeft);
}

}  // namespace gptcore::cuda
