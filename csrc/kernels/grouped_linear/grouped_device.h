// What grouped_linear.cpp hands to another device, already checked but for the offsets, which are read there alone.
#pragma once

#include <cstdint>

namespace gptcore {

// Rows of each group by its expert's matrix (y, dx): out[r] = in[r] weight[e]^T, or without the transpose.
struct GroupedRowsDevice {
  const void *in, *weight, *bias;  // bias (E, width) or null
  void* out;
  const int32_t* offsets;               // (E + 1)
  int64_t experts, rows, depth, width;  // rows of `in` and `out`: behind the last group's they become zeros
  int64_t in_stride, out_stride;
  bool depth_lines;  // the weight's lines run along the depth (y), not along the width (dx)
  bool f32_bias;
};

// dweight[e] (+)= sum over the group's rows of dy[r]^T x[r].
struct GroupedWeightDevice {
  const void *dy, *x;
  void* dweight;
  const int32_t* offsets;
  int64_t experts, rows, outer, inner;
  int64_t dy_stride, x_stride;
  bool accumulate, f32_out;
};

// dbias[e] = sum over the group's rows of dy[r].
struct GroupedBiasDevice {
  const void* dy;
  void* dbias;
  const int32_t* offsets;
  int64_t experts, rows, outer, dy_stride;
  bool f32_out;
};

// [bf16?]
struct GroupedDeviceBodies {
  void (*rows[2])(const GroupedRowsDevice&);
  void (*weight[2])(const GroupedWeightDevice&);
  void (*bias[2])(const GroupedBiasDevice&);
};

// Experts whose places a block keeps in shared memory.
constexpr int64_t kMostDeviceExperts = 16384;

}  // namespace gptcore
