// What attention.cpp hands to the per-ISA bodies: pointers, sizes and strides, already checked.
#pragma once

#include <cstdint>

namespace gptcore {

constexpr int32_t kKeepAll = 65536;
constexpr int64_t kMaxDeviceTokens = int64_t{1} << 29;  // that CUDA's kernels count

// (B, T, H, D), or (total, H, D) with batch stride 0; strides in elements, the last dimension contiguous.
struct AttentionTensor {
  void* data;
  int64_t batch, token, head;
};

// A cache in pages of `size` tokens: key s of sequence b lies in page table[b row + s div size], at place s mod size.
// k and v are then (pages, size, Hkv, D), and their `batch` leads from page to page.
struct AttentionPages {
  const int32_t* table;      // null: keys lie one after the other
  const int32_t* lengths;    // keys of each sequence
  int64_t row, size, count;  // entries from one sequence's to the next's; tokens of a page; pages
};

struct AttentionProblem {
  AttentionTensor q, k, v, out;      // out is read by backward, and null there for nothing else
  AttentionTensor dout, dq, dk, dv;  // backward only
  float* lse;                        // f32, tokens contiguous
  int64_t lse_batch, lse_head;
  const int32_t *cu_q, *cu_k;  // null unless packed; then `batch` counts documents
  AttentionPages pages;
  // Per sequence. When packed the longest document's, or the totals where lengths are not read on the host; keys in
  // pages: as many as a sequence has room for.
  int64_t batch, queries, keys;
  int64_t total_q, total_k;  // tokens of all documents
  int64_t heads, kv_heads, head_dim;
  float scale;
  int64_t left, right;  // window in keys; negative means unbounded. Causal is right = 0.
  bool modified;        // whether anything of what follows acts on the scores: see scores.h
  float soft_cap;       // 0: none
  const float* slopes;  // ALiBi, or null
  int64_t slopes_batch, slopes_head;
  // Bytes; f32 or q's type. Strides are 0 where they serve all; data may be null.
  AttentionTensor mask, bias;
  bool bias_16bit;        // bf16, or f16 where q is
  AttentionTensor dbias;  // backward only: f32
  const float* sinks;     // one a head, or null
  const float* dlse;      // backward only: like lse, or null
  float* dsinks;
  bool dbias_batches, dbias_heads;  // whether sequences and heads have a dbias of their own
  int64_t stride, summary;          // pattern.h; stride 0: none
  const int32_t* prefix;            // null, or how many first keys each sequence's queries all see
  // Dropout: of kKeepAll probabilities `keep` stay and count keep_scale times; all with kKeepAll, once.
  int32_t keep;
  float keep_scale;
  uint64_t seed;
  const int64_t* seed_at;  // where to read it instead, on another device
  uint32_t offset;
};

struct AttentionBodies {
  void (*forward)(const AttentionProblem&);
  void (*backward)(const AttentionProblem&);
};

}  // namespace gptcore
