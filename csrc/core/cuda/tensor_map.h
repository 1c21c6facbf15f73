// Descriptions of tensors for Hopper's copy engine (TMA): what it needs to fetch or store a box of up to five
// dimensions by its coordinates. Made on the host, given to kernels as `const __grid_constant__` parameters (a struct
// of them may be one), read by core/cuda/hopper.cuh. Plain C++.
#pragma once

#include <cstdint>

#include "core/dtype.h"

namespace gptcore::cuda {

struct alignas(64) TensorMap {
  uint64_t words[16];
};

// Innermost dimension first. A box is written to shared memory row by row, without gaps; its rows of `swizzle` bytes
// are then permuted (core/cuda/wgmma.cuh). What lies outside the tensor is read as zero and not written.
struct TensorBoxes {
  const void* data;
  DType dtype;         // bf16, f16 or f32
  int rank;            // 2 to 5
  int64_t sizes[5];    // 1 to 2^32
  int64_t strides[5];  // in elements; strides[0] is 1, that of a dimension of size 1 does not matter
  int box[5];          // 1 to 256
  int swizzle;         // 0, 32, 64 or 128: then the bytes of the box's innermost dimension
};

// Null, or what keeps the copy engine from such a tensor: callers ask first and take another kernel.
inline const char* unfit_for_tensor_map(const TensorBoxes& b) {
  const int64_t size = size_of(b.dtype);
  if (b.dtype != DType::bf16 && b.dtype != DType::f16 && b.dtype != DType::f32) return "its type";
  if (b.rank < 2 || b.rank > 5) return "its rank";
  if (reinterpret_cast<uintptr_t>(b.data) % 16 != 0)
    return "data that do not begin at a multiple of 16 bytes";
  if (b.strides[0] != 1 && b.sizes[0] != 1) return "an innermost stride other than 1";
  if (b.swizzle ? b.box[0] * size != b.swizzle : b.box[0] * size % 16 != 0) return "the box's row";
  for (int d = 0; d < b.rank; ++d) {
    if (b.sizes[d] < 1 || b.sizes[d] > int64_t{1} << 32) return "a size";
    if (b.box[d] < 1 || b.box[d] > 256) return "a box's size";
    const int64_t stride = b.strides[d] * size;
    if (d > 0 && b.sizes[d] > 1 && (stride <= 0 || stride % 16 != 0 || stride >= int64_t{1} << 40))
      return "a stride that is no multiple of 16 bytes";
  }
  return nullptr;
}

// Throws where unfit_for_tensor_map or the driver has an objection.
TensorMap tensor_map(const TensorBoxes& boxes);

}  // namespace gptcore::cuda
