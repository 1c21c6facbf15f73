#include "mma_check.h"

#include <string>
#include <vector>

#include "core/cuda/launch.cuh"
#include "core/cuda/mma.cuh"

namespace gptcore::cuda {
namespace {

struct TileProduct {
  const void *a, *b;  // (16, depth); (8, depth), or (depth, 8) where transposed
  float* d;           // (16, 8)
  int depth, row_bytes;
};

// Rows of `bytes` bytes, `room` of which lie in shared memory, zeros behind the matrix.
template <int kRowBytes>
void copy_rows(unsigned char* tile, const void* from, int rows, int bytes) {
  for (int i = lane(); i < rows * (kRowBytes / 16); i += kWarp) {
    const int row = i / (kRowBytes / 16), chunk = i % (kRowBytes / 16);
    const int left = std::min(std::max(bytes - 16 * chunk, 0), 16);
    const auto* source = static_cast<const unsigned char*>(from) + (left ? row * bytes + 16 * chunk : 0);
    copy_async(tile + swizzled<kRowBytes>(row, chunk), source, left);
  }
}

// One warp: D = A B^T over kRowBytes of depth.
template <class T, int kRowBytes>
void tile_product(const TileProduct p) {
  unsigned char* a = shared_memory();
  unsigned char* b = a + 16 * kRowBytes;
  copy_rows<kRowBytes>(a, p.a, 16, p.depth * static_cast<int>(sizeof(T)));
  copy_async_commit();
  copy_rows<kRowBytes>(b, p.b, 8, p.depth * static_cast<int>(sizeof(T)));
  copy_async_commit();
  copy_async_wait<1>();
  copy_async_wait<0>();
  __syncwarp();
  float d[4] = {};
  for (int chunk = 0; chunk < kRowBytes / 16; chunk += 2) {
    uint32_t x[4], y[2];
    load_matrices(x, a + swizzled<kRowBytes>(lane() % 16, chunk + lane() / 16));
    load_matrices(y, b + swizzled<kRowBytes>(lane() % 8, chunk + lane() / 8 % 2));
    if constexpr (sizeof(T) == 4) {
      mma_16x8x8_tf32(d, x, y[0], y[1]);
    } else {
      mma_16x8x16<T>(d, x, y[0], y[1]);
    }
  }
  for (int i = 0; i < 4; ++i) p.d[(lane() / 4 + 8 * (i / 2)) * 8 + 2 * (lane() % 4) + i % 2] = d[i];
}

// The same for depth 32, with B's rows along the depth, read transposed.
template <class T>
void transposed_product(const TileProduct p) {
  unsigned char* a = shared_memory();
  unsigned char* b = a + 16 * 64;
  copy_rows<64>(a, p.a, 16, 64);
  copy_rows<32>(b, p.b, 32, 16);
  copy_async_commit();
  copy_async_wait<0>();
  __syncwarp();
  float d[4] = {};
  uint32_t y[4], last[2];
  load_matrices_transposed(y, b + swizzled<32>(lane(), 0));
  load_matrices_transposed(last, b + swizzled<32>(16 + lane() % 16, 0));
  if (last[0] != y[2] || last[1] != y[3]) simt::fail("two loads of the same matrices differ");
  for (int half = 0; half < 2; ++half) {
    uint32_t x[4];
    load_matrices(x, a + swizzled<64>(lane() % 16, 2 * half + lane() / 16));
    mma_16x8x16<T>(d, x, y[2 * half], y[2 * half + 1]);
  }
  for (int i = 0; i < 4; ++i) p.d[(lane() / 4 + 8 * (i / 2)) * 8 + 2 * (lane() % 4) + i % 2] = d[i];
}

template <class T>
void run(const TileProduct& p, bool transposed) {
  const Launch l{dim3(1), dim3(kWarp), 24 * 512};
  if constexpr (sizeof(T) == 2) {
    if (transposed) return launch<&transposed_product<T>>(l, p);
  }
  switch (p.row_bytes) {
    case 32:
      return launch<&tile_product<T, 32>>(l, p);
    case 64:
      return launch<&tile_product<T, 64>>(l, p);
    case 128:
      return launch<&tile_product<T, 128>>(l, p);
    case 192:
      return launch<&tile_product<T, 192>>(l, p);
    default:
      return launch<&tile_product<T, 512>>(l, p);
  }
}

// Addresses are those of the tests' tensors, aligned to 16.
void product(const std::string& dtype, uintptr_t a, uintptr_t b, uintptr_t d, int depth, int row_bytes,
             bool transposed) {
  const TileProduct p{reinterpret_cast<const void*>(a), reinterpret_cast<const void*>(b),
                      reinterpret_cast<float*>(d), depth, row_bytes};
  if (dtype == "bfloat16") return run<bf16>(p, transposed);
  if (dtype == "float16") return run<f16>(p, transposed);
  run<float>(p, transposed);
}

}  // namespace

void define_mma_check(pybind11::module_& m) {
  m.def("mma_product", &product);
  m.def("swizzled", [](int row_bytes, int row, int chunk) {
    switch (row_bytes) {
      case 32:
        return swizzled<32>(row, chunk);
      case 64:
        return swizzled<64>(row, chunk);
      case 128:
        return swizzled<128>(row, chunk);
      case 192:
        return swizzled<192>(row, chunk);
      case 384:
        return swizzled<384>(row, chunk);
      default:
        return swizzled<512>(row, chunk);
    }
  });
}

}  // namespace gptcore::cuda
