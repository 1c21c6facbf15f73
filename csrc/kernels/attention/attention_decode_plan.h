// How attention of few queries is divided on CUDA: which problems are of that kind, and how their keys are split over
// blocks. A function of the shape alone. Plain C++.
#pragma once

#include <algorithm>
#include <cstdint>

#include "kernels/attention/attention_body.h"

namespace gptcore::cuda {

constexpr int kDecodeWarps = 4, kDecodeRows = 16, kDecodeKeys = 64, kJoinThreads = 128;
constexpr int64_t kDecodeQueries = 16;  // a sequence has at most
// A part has at least so many keys, and there are at most so many parts: a few hundred kilobytes for each block to read
// hide its start, and joining stays cheap.
constexpr int64_t kPartKeys = 256, kMaxParts = 64;

struct DecodePlan {
  int group, rows;       // query heads of a key head; rows of each key head
  int row_blocks;        // of kDecodeRows
  int begin, part_keys;  // the first key that any query sees; a multiple of kDecodeKeys
  int parts;
  bool modified, aligned;
};

// Queries, also the warps' states; a tile of keys and one of values, also the warps' sums in f32.
constexpr int64_t decode_shared_bytes(int64_t dim, int64_t element_bytes) {
  const int64_t tiles = 2 * kDecodeKeys * dim * element_bytes, sums = 4 * kDecodeWarps * kDecodeRows * dim;
  return kDecodeRows * dim * element_bytes + std::max(tiles, sums);
}

// Documents' lengths are not known here; a pattern's hidden keys are not skipped, and nobody drops while decoding. Sums of
// f32 beyond a head size of 128, split as they are, want more registers than there are.
inline bool decode_takes(const AttentionProblem& p, int64_t element_bytes) {
  if (element_bytes == 4 && p.head_dim > 128) return false;
  return !p.cu_q && p.queries <= kDecodeQueries && p.keep == kKeepAll && p.stride == 0;
}

inline DecodePlan decode_plan(const AttentionProblem& p) {
  DecodePlan plan{};
  plan.group = static_cast<int>(p.heads / p.kv_heads);
  plan.rows = static_cast<int>(p.queries) * plan.group;
  plan.row_blocks = (plan.rows + kDecodeRows - 1) / kDecodeRows;
  const int64_t begin = p.left < 0 ? 0 : std::clamp<int64_t>(p.keys - p.queries - p.left, 0, p.keys);
  const int64_t keys = p.keys - begin, even = (keys + kMaxParts - 1) / kMaxParts;
  const int64_t part = (std::max(even, kPartKeys) + kDecodeKeys - 1) / kDecodeKeys * kDecodeKeys;
  plan.begin = static_cast<int>(begin), plan.part_keys = static_cast<int>(part);
  plan.parts = static_cast<int>(std::max<int64_t>((keys + part - 1) / part, 1));
  plan.modified = p.modified || !(p.scale > 0.0f);
  return plan;
}

}  // namespace gptcore::cuda
