// What attention.cpp hands to the per-ISA bodies: pointers, sizes and strides, already checked.
#pragma once

#include <cstdint>

namespace gptcore {

// (B, T, H, D), or (total, H, D) with batch stride 0; strides in elements, the last dimension contiguous.
struct AttentionTensor {
  void* data;
  int64_t batch, token, head;
};

struct AttentionProblem {
  AttentionTensor q, k, v, out;      // out is read by backward, and null there for nothing else
  AttentionTensor dout, dq, dk, dv;  // backward only
  float* lse;                        // f32, tokens contiguous
  int64_t lse_batch, lse_head;
  const int32_t *cu_q, *cu_k;    // null unless packed; then `batch` counts documents
  int64_t batch, queries, keys;  // per sequence; the longest document when packed
  int64_t heads, kv_heads, head_dim;
  float scale;
  int64_t left, right;  // window in keys; negative means unbounded. Causal is right = 0.
};

struct AttentionBodies {
  void (*forward)(const AttentionProblem&);
  void (*backward)(const AttentionProblem&);
};

}  // namespace gptcore
