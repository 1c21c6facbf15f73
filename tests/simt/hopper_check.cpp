#include "hopper_check.h"

#include <pybind11/stl.h>

#include <stdexcept>
#include <string>
#include <vector>

#include "core/cuda/launch.cuh"
#include "core/cuda/wgmma.cuh"

namespace gptcore::cuda {
namespace {

// --- products --------------------------------------------------------------------------------------------------

enum class Slip { none, operand_overwritten, sums_written, no_fence, no_wait };

struct Product {
  TensorMap a, b;
  const void* a_data;  // (64, depth), for A in registers
  float* d;            // (64, N)
  Slip slip;
};

constexpr int kDepth = 64;  // two panels and more, where they are narrow

// A tile of kRows rows and kColumns columns, panel after panel.
template <int kSwizzle, int kRows, int kColumns>
void load_tile(unsigned char* to, const TensorMap& map, uint64_t* barrier) {
  mbarrier_arrive_expecting(barrier, kRows * kColumns * 2);
  for (int c = 0; c < kColumns; c += kSwizzle / 2) tma_load(to + c * 2 * kRows, map, barrier, c, 0);
}

template <int kSwizzle, Major kMajor, int kRows>
uint64_t tile_operand(const void* tile) {
  if constexpr (kMajor == Major::k) return k_major_operand<kSwizzle>(tile);
  return mn_major_operand<kSwizzle, kDepth>(tile);
}
template <int kSwizzle, Major kMajor, int kRows>
uint64_t tile_step(int i) {
  return kMajor == Major::k ? k_major_step<kSwizzle, kRows>(i) : mn_major_step<kSwizzle>(i);
}

// kA is not used where A comes from registers.
template <class T, int N, int kSwizzle, bool kRegisters, Major kA, Major kB>
void product(const Product p) {
  constexpr int kRowsA = kA == Major::k ? 64 : kDepth, kRowsB = kB == Major::k ? N : kDepth;
  unsigned char* a = shared_memory();
  unsigned char* b = a + 64 * kDepth * 2;
  auto* barriers = reinterpret_cast<uint64_t*>(b + N * kDepth * 2);
  if (threadIdx.x == 0) {
    for (int i = 0; i < 2; ++i) mbarrier_init(barriers + i, 1);
    mbarrier_init_fence();
  }
  __syncthreads();
  if (threadIdx.x == 0) {
    load_tile<kSwizzle, kRowsA, 64 * kDepth / kRowsA>(a, p.a, barriers);
    load_tile<kSwizzle, kRowsB, N * kDepth / kRowsB>(b, p.b, barriers + 1);
  }
  mbarrier_wait(barriers, 0);
  mbarrier_wait(barriers + 1, 0);
  const int row = warp() % 4 * 16 + lane() / 4, t = lane() % 4;
  float d[N / 2];
  for (float& x : d) x = 1000.0f;  // what the first product overwrites
  if (p.slip != Slip::no_fence) wgmma_fence(d);
  for (int i = 0; i < kDepth / 16; ++i) {
    const uint64_t right = tile_operand<kSwizzle, kB, kRowsB>(b) + tile_step<kSwizzle, kB, kRowsB>(i);
    if constexpr (kRegisters) {
      uint32_t fragment[4];
      for (int h = 0; h < 4; ++h) {
        std::memcpy(
            &fragment[h],
            static_cast<const T*>(p.a_data) + (row + 8 * (h % 2)) * kDepth + 16 * i + 8 * (h / 2) + 2 * t, 4);
      }
      wgmma<N, T, kB>(d, fragment, right, i > 0);
    } else {
      wgmma<N, T, kA, kB>(d, tile_operand<kSwizzle, kA, kRowsA>(a) + tile_step<kSwizzle, kA, kRowsA>(i),
                          right, i > 0);
    }
  }
  if (p.slip == Slip::sums_written) d[0] = 0.0f;
  if (p.slip == Slip::operand_overwritten) b[threadIdx.x] = 0;
  wgmma_commit();
  if (p.slip != Slip::no_wait) wgmma_wait<0>(d);
  for (int j = 0; j < N / 2; ++j) p.d[(row + 8 * (j / 2 % 2)) * N + j / 4 * 8 + 2 * t + j % 2] = d[j];
}

TensorMap matrix_map(DType dtype, uintptr_t data, int rows, int columns, int swizzle) {
  return tensor_map({reinterpret_cast<const void*>(data),
                     dtype,
                     2,
                     {columns, rows},
                     {1, columns},
                     {swizzle / 2, rows},
                     swizzle});
}

template <class T, int N, int kSwizzle, bool kRegisters, Major kA, Major kB>
void run_product(uintptr_t a, uintptr_t b, uintptr_t d, Slip slip) {
  constexpr int kRowsA = kA == Major::k ? 64 : kDepth, kRowsB = kB == Major::k ? N : kDepth;
  const Product p{matrix_map(dtype_of<T>(), a, kRowsA, 64 * kDepth / kRowsA, kSwizzle),
                  matrix_map(dtype_of<T>(), b, kRowsB, N * kDepth / kRowsB, kSwizzle),
                  reinterpret_cast<const void*>(a), reinterpret_cast<float*>(d), slip};
  launch<&product<T, N, kSwizzle, kRegisters, kA, kB>>(
      {dim3(1), dim3(kWarpgroup), (64 + N) * kDepth * 2 + 16}, p);
}

// a: "k", "mn" or "registers"; b: "k" or "mn".
template <class T, int N, int kSwizzle>
void by_layout(const std::string& a_layout, const std::string& b_layout, uintptr_t a, uintptr_t b,
               uintptr_t d, Slip slip) {
  constexpr Major k = Major::k, mn = Major::mn;
  const bool plain = b_layout == "k";
  if (a_layout == "registers") {
    return plain ? run_product<T, N, kSwizzle, true, k, k>(a, b, d, slip)
                 : run_product<T, N, kSwizzle, true, k, mn>(a, b, d, slip);
  }
  if (a_layout == "k") {
    return plain ? run_product<T, N, kSwizzle, false, k, k>(a, b, d, slip)
                 : run_product<T, N, kSwizzle, false, k, mn>(a, b, d, slip);
  }
  return plain ? run_product<T, N, kSwizzle, false, mn, k>(a, b, d, slip)
               : run_product<T, N, kSwizzle, false, mn, mn>(a, b, d, slip);
}

void warpgroup_product(const std::string& dtype, int n, int swizzle, const std::string& a_layout,
                       const std::string& b_layout, uintptr_t a, uintptr_t b, uintptr_t d, int slip) {
  const auto run = [&](auto by) { by(a_layout, b_layout, a, b, d, static_cast<Slip>(slip)); };
  const bool half = dtype == "float16";
  if (n == 64 && swizzle == 32) return run(half ? by_layout<f16, 64, 32> : by_layout<bf16, 64, 32>);
  if (n == 64 && swizzle == 64) return run(half ? by_layout<f16, 64, 64> : by_layout<bf16, 64, 64>);
  if (n == 64 && swizzle == 128) return run(half ? by_layout<f16, 64, 128> : by_layout<bf16, 64, 128>);
  if (n == 32) return run(by_layout<bf16, 32, 64>);
  if (n == 96) return run(by_layout<bf16, 96, 64>);
  if (n == 128) return run(by_layout<bf16, 128, 128>);
  if (n == 192) return run(by_layout<bf16, 192, 128>);
  if (n == 256) return run(by_layout<bf16, 256, 128>);
  throw std::runtime_error("warpgroup_product: not compiled");
}

// --- copies ----------------------------------------------------------------------------------------------------

struct BoxCopy {
  TensorMap from, to;
  unsigned char* seen;  // shared memory as it lies
  int rank, bytes, at[5];
};

template <class Call>
void with_coordinates(int rank, const int (&c)[5], const Call& call) {
  if (rank == 2) return call(c[0], c[1]);
  if (rank == 3) return call(c[0], c[1], c[2]);
  if (rank == 4) return call(c[0], c[1], c[2], c[3]);
  call(c[0], c[1], c[2], c[3], c[4]);
}

void copy_box(const BoxCopy p) {
  unsigned char* box = shared_memory();
  auto* barrier = reinterpret_cast<uint64_t*>(box + (p.bytes + 15) / 16 * 16);
  if (threadIdx.x == 0) {
    mbarrier_init(barrier, 1);
    mbarrier_init_fence();
    prefetch(p.from);
  }
  __syncthreads();
  if (warp() == 0 && elect_one()) {
    mbarrier_arrive_expecting(barrier, static_cast<unsigned>(p.bytes));
    with_coordinates(p.rank, p.at, [&](auto... c) { tma_load(box, p.from, barrier, c...); });
  }
  mbarrier_wait(barrier, 0);
  for (int i = static_cast<int>(threadIdx.x); i < p.bytes; i += kWarpgroup) p.seen[i] = box[i];
  __syncthreads();
  if (threadIdx.x == 0) {
    with_coordinates(p.rank, p.at, [&](auto... c) { tma_store(p.to, box, c...); });
    bulk_commit();
    bulk_wait_read<0>();
  }
}

// Sizes, strides (in elements) and the box are innermost first.
void copy_boxes(const std::string& dtype, uintptr_t from, uintptr_t to, const std::vector<int64_t>& sizes,
                const std::vector<int64_t>& strides, const std::vector<int>& box, const std::vector<int>& at,
                int swizzle, uintptr_t seen) {
  TensorBoxes boxes{reinterpret_cast<const void*>(from),
                    dtype == "float32" ? DType::f32 : DType::bf16,
                    static_cast<int>(sizes.size()),
                    {},
                    {},
                    {},
                    swizzle};
  BoxCopy p{};
  p.seen = reinterpret_cast<unsigned char*>(seen), p.rank = boxes.rank;
  p.bytes = static_cast<int>(size_of(boxes.dtype));
  for (size_t d = 0; d < sizes.size(); ++d) {
    boxes.sizes[d] = sizes[d], boxes.strides[d] = strides[d], boxes.box[d] = box[d];
    p.at[d] = at[d], p.bytes *= box[d];
  }
  p.from = tensor_map(boxes);
  boxes.data = reinterpret_cast<const void*>(to);
  p.to = tensor_map(boxes);
  launch<&copy_box>({dim3(1), dim3(kWarpgroup), (p.bytes + 15) / 16 * 16 + 8}, p);
}

struct Runs {
  const float* from;
  float *to, *sum;
  int count, bytes;
};

// Runs through two stages of shared memory, one loading while the other is stored and added.
void copy_runs(const Runs p) {
  float* stages = shared_memory<float>();
  auto* barriers = reinterpret_cast<uint64_t*>(stages + p.bytes / 2);
  if (threadIdx.x != 0) return;
  for (int i = 0; i < 2; ++i) mbarrier_init(barriers + i, 1);
  mbarrier_init_fence();
  const int step = p.bytes / 4;
  for (int i = 0; i <= p.count; ++i) {
    if (i < p.count) {
      bulk_wait_read<0>();
      mbarrier_arrive_expecting(barriers + i % 2, static_cast<unsigned>(p.bytes));
      bulk_load(stages + i % 2 * step, p.from + i * step, static_cast<unsigned>(p.bytes), barriers + i % 2);
    }
    if (i == 0) continue;
    const int last = i - 1;
    mbarrier_wait(barriers + last % 2, last / 2 % 2);
    bulk_store(p.to + last * step, stages + last % 2 * step, static_cast<unsigned>(p.bytes));
    bulk_add(p.sum, stages + last % 2 * step, static_cast<unsigned>(p.bytes));
    bulk_commit();
  }
  bulk_wait<0>();
}

void bulk_runs(uintptr_t from, uintptr_t to, uintptr_t sum, int count, int bytes) {
  launch<&copy_runs>({dim3(1), dim3(kWarp), 2 * bytes + 16},
                     Runs{reinterpret_cast<const float*>(from), reinterpret_cast<float*>(to),
                          reinterpret_cast<float*>(sum), count, bytes});
}

}  // namespace

void define_hopper_check(pybind11::module_& m) {
  m.def("warpgroup_product", &warpgroup_product);
  m.def("copy_boxes", &copy_boxes);
  m.def("bulk_runs", &bulk_runs);
}

}  // namespace gptcore::cuda
