// What a kernel sees of a tensor: pointer, type, device, sizes and strides, all borrowed from the caller for
// the length of one call. An undefined view (data, sizes and ndim zero, defined false) stands for None.
#pragma once

#include <cstdint>

#include "core/dtype.h"

namespace gptcore {

enum class Device : uint8_t { cpu, cuda };

struct TensorView {
  void* data = nullptr;
  DType dtype = DType::other;
  Device device = Device::cpu;
  bool defined = false;
  bool readonly = false;
  int32_t device_index = 0;
  int32_t ndim = 0;
  const int64_t* sizes = nullptr;
  const int64_t* strides = nullptr;  // in elements; null means contiguous, row-major

  explicit operator bool() const { return defined; }

  // Negative positions count from the end, as in Python.
  int64_t size(int i) const { return sizes[i < 0 ? ndim + i : i]; }

  int64_t stride(int i) const {
    if (i < 0) i += ndim;
    if (strides) return strides[i];
    int64_t step = 1;
    for (int d = ndim - 1; d > i; --d) step *= sizes[d];
    return step;
  }

  int64_t numel() const {
    int64_t count = 1;
    for (int d = 0; d < ndim; ++d) count *= sizes[d];
    return count;
  }

  // Row-major without gaps; a dimension of one element may have any stride.
  bool is_contiguous() const {
    if (!strides) return true;
    int64_t step = 1;
    for (int d = ndim - 1; d >= 0; --d) {
      if (sizes[d] != 1 && strides[d] != step) return numel() == 0;
      step *= sizes[d];
    }
    return true;
  }

  template <class T>
  T* as() const {
    return static_cast<T*>(data);
  }
};

// Index into tables of bodies by dtype: 0 for f32, 1 for bf16.
inline int is_bf16(const TensorView& tensor) { return tensor.dtype == DType::bf16; }

}  // namespace gptcore
