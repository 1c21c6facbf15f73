// What rotary.cpp hands to the per-ISA bodies: pointers, sizes and strides, already checked.
#pragma once

#include <cstdint>

namespace gptcore {

struct RotaryStrides {
  int64_t batch, token, head;
};

struct Rotary {
  const void* x;
  void* out;
  const float *cos, *sin;  // (length, half)
  int64_t length;
  const int32_t* positions;  // may be null
  int64_t position_batch_stride;
  int64_t offset;
  int64_t batch, tokens, heads, head_size, half;
  RotaryStrides x_strides, out_strides;
  bool interleaved, inverse;
};

// [x bf16?]
struct RotaryBodies {
  void (*run[2])(const Rotary&);
};

}  // namespace gptcore
