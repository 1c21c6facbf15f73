// What moe_router.cpp hands to another device, which does everything there: no number comes back to the processor.
#pragma once

#include <cstdint>

namespace gptcore {

struct MoeRouterDeviceForward {
  const void* logits;
  int64_t stride, tokens, experts, choices;
  bool bf16;                         // the logits' type
  const uint8_t* mask;               // null: every token counts
  const float *priority, *uniforms;  // null: none; uniforms only where second choices are left to chance
  bool renormalise, by_gate, count_all;
  double second_threshold;
  int64_t capacity;
  int32_t *chosen, *rows, *offsets, *requested;
  float *gates, *balance_loss, *z_loss, *entropy, *lse, *share;
};

struct MoeRouterDeviceBackward {
  const void* logits;
  void* dlogits;
  int64_t stride, out_stride, tokens, experts, choices;
  bool bf16;
  const int32_t *chosen, *rows;
  const float *dgates, *dbalance_loss, *dz_loss;  // null: zero
  const float *lse, *share;
  bool renormalise;
};

struct MoeRouterDeviceBodies {
  void (*forward)(const MoeRouterDeviceForward&);
  void (*backward)(const MoeRouterDeviceBackward&);
};

}  // namespace gptcore
