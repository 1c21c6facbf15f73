// What moe_router.cpp hands to the per-ISA bodies, already checked.
#pragma once

#include <cstdint>

namespace gptcore {

constexpr int64_t kMostChoices = 64;

struct MoeRouterForward {
  const void* logits;
  int64_t stride, tokens, experts, choices;
  const uint8_t* mask;  // null: every token counts
  bool renormalise;
  int64_t chunk;  // tokens whose sums are added up together
  int32_t* chosen;
  float *gates, *lse;
  float* top_probability;                // (N) of the first choice
  float *probabilities, *z_and_entropy;  // sums by chunk: (chunks, E), (chunks, 2)
  int32_t* counts;                       // (chunks, 2, E): how many choose first, and later
};

struct MoeRouterBackward {
  const void* logits;
  void* dlogits;
  int64_t stride, out_stride, tokens, experts, choices;
  const int32_t *chosen, *rows;  // -1 in the first choice of padding
  const float *dgates, *lse;
  const float* balance_factor;  // (E): what a probability of each expert adds to the loss
  float z_factor;               // what lse adds to the loss for each unit of lse
  bool renormalise;
};

// [logits bf16?]
struct MoeRouterBodies {
  void (*forward[2])(const MoeRouterForward&);
  void (*backward[2])(const MoeRouterBackward&);
};

}  // namespace gptcore
