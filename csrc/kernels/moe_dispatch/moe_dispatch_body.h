// What moe_dispatch.cpp hands to the per-ISA bodies, already checked. `tokens` lie as tokens do, `sorted` by expert.
#pragma once

#include <cstdint>

namespace gptcore {

constexpr int64_t kMostDispatchChoices = 64;

struct MoeDispatch {
  const void* tokens;
  void* sorted;
  const int32_t* rows;
  int64_t count, choices, width, used, all;  // N, K, C; rows of `sorted` in use, and all of them
  const int32_t* used_rows;                  // where `used` lies: on another device it is known there alone
  int64_t token_stride, sorted_stride;
};

struct MoeCombine {
  const void* sorted;
  void* tokens;
  const int32_t* rows;
  const float* gates;  // null: ones
  int64_t count, choices, width, all, token_stride, sorted_stride;
};

struct MoeCombineBackward {
  const void *dtokens, *sorted;
  void* dsorted;
  const int32_t* rows;
  const float* gates;
  float* dgates;
  int64_t count, choices, width, used, all;
  const int32_t* used_rows;
  int64_t token_stride, sorted_stride, dsorted_stride;
};

// [bf16?]
struct MoeDispatchBodies {
  void (*dispatch[2])(const MoeDispatch&);
  void (*combine[2])(const MoeCombine&);
  void (*combine_backward[2])(const MoeCombineBackward&);
};

}  // namespace gptcore
