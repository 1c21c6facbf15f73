// Tiles of a head's tokens as the copy engine brings them, for the kernels for sm_90: panels of 64 columns, which are 128
// bytes a row, swizzled.
//
// Four dimensions: column, token, head, sequence. Packed documents lie one behind the other, and a box at the end of one
// must not bring the next one's tokens: they would be multiplied by probabilities of zero, and may be infinite. So there
// tokens are counted from behind. The dimension of tokens is one box long, begins a box before the tensor, and the last
// dimension moves it by tokens as well: of a tile of n tokens from `begin` on, token t is at (box - n + t, begin + n).
// What lies behind the n-th is outside then, and comes as zeros; what lies before the tensor has no coordinates.
#pragma once

#include "core/cuda/tensor_map.h"
#include "kernels/attention/attention_masks.cuh"

namespace gptcore::cuda {

constexpr int kPanelColumns = 64;

// Of q or dout (tokens and heads of queries), or k or v; `rows` tokens a box.
inline TensorBoxes attention_boxes(const AttentionTensor& t, DType dtype, int64_t tokens, int64_t heads,
                                   const AttentionProblem& p, int rows) {
  TensorBoxes b{t.data,
                dtype,
                4,
                {p.head_dim, tokens, heads, p.batch},
                {1, t.token, t.head, t.batch},
                {kPanelColumns, rows, 1, 1},
                2 * kPanelColumns};
  if (!p.cu_q) return b;
  const auto before = static_cast<uintptr_t>(rows * t.token * size_of(dtype));
  b.data = reinterpret_cast<const void*>(reinterpret_cast<uintptr_t>(t.data) - before);
  b.sizes[1] = rows, b.sizes[3] = tokens + 1, b.strides[3] = t.token;
  return b;
}
inline TensorBoxes query_boxes(const AttentionTensor& t, DType dtype, const AttentionProblem& p, int rows) {
  return attention_boxes(t, dtype, p.cu_q ? p.total_q : p.queries, p.heads, p, rows);
}
inline TensorBoxes key_boxes(const AttentionTensor& t, DType dtype, const AttentionProblem& p, int rows) {
  return attention_boxes(t, dtype, p.cu_q ? p.total_k : p.keys, p.kv_heads, p, rows);
}

// Coordinates of a box of `rows` tokens of a sequence, column and head left out.
struct BoxPlace {
  int token, sequence;
};
// From token `first` on of `tokens`, the first of which is number `begin` of the packed ones.
__device__ inline BoxPlace box_place(bool packed, int index, int64_t begin, int tokens, int first, int rows) {
  if (!packed) return {first, index};
  const int here = min(rows, tokens - first);
  return {rows - here, static_cast<int>(begin) + first + here};
}

}  // namespace gptcore::cuda
