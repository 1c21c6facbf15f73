// csrc/core/cuda/integer.cuh for the processor.
#pragma once

#include <cstdint>

namespace gptcore::cuda {

struct WideProduct {
  uint32_t low, high;
};

inline WideProduct multiply_wide(uint32_t a, uint32_t b) {
  const uint64_t p = uint64_t{a} * b;
  return {static_cast<uint32_t>(p), static_cast<uint32_t>(p >> 32)};
}

}  // namespace gptcore::cuda
