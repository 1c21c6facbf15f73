// What embedding.cpp hands to the per-ISA bodies: pointers, sizes and strides, already checked.
#pragma once

#include <cstdint>

namespace gptcore {

// Sizes and strides in bytes: a copy does not ask for the type.
struct EmbeddingForward {
  const void* ids;
  const char* table;
  char* out;
  int64_t count, vocabulary, row_bytes, table_stride, out_stride;
};

// The occurrences of all ids, sorted by id: those of v are order[vocabulary_start[v]] and on. Null for a device, which
// sorts them itself.
struct EmbeddingBackward {
  const void* ids;
  bool long_ids;                    // int64
  const int32_t* vocabulary_start;  // (V + 1): where id v's occurrences begin in `order`
  const int32_t* order;             // (N): row numbers of grad_out, by id, then by number
  const void* grad_out;
  void* dweight;
  int64_t vocabulary, tokens, width, grad_stride;
  bool accumulate;
};

struct EmbeddingBodies {
  void (*forward[2])(const EmbeddingForward&);       // [ids int64?]
  void (*backward[2][2])(const EmbeddingBackward&);  // [grad_out bf16?][dweight bf16?]
};

}  // namespace gptcore
