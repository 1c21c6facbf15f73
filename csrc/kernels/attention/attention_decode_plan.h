// How attention of few queries is divided on CUDA: which problems are of that kind, and how their keys are split over
// blocks. A function of the shape alone. Plain C++ but for the words by which nvcc knows what both sides call.
#pragma once

#include <algorithm>
#include <cstdint>

#include "kernels/attention/attention_body.h"

#if defined(__CUDACC__)
#define GPTCORE_BOTH_SIDES __host__ __device__
#else
#define GPTCORE_BOTH_SIDES
#endif

namespace gptcore::cuda {

constexpr int kDecodeWarps = 4, kDecodeRows = 16, kDecodeKeys = 64, kJoinThreads = 128;
constexpr int64_t kDecodeQueries = 16;  // a sequence has at most, unless its keys lie in pages
// Of packed documents on the average: how many one has is known to the device alone, and any number is computed right.
constexpr int64_t kDecodePacked = 4;
// A part has at least so many keys, and there are at most so many parts: a few hundred kilobytes for each block to read
// hide its start, and joining stays cheap. Where rows alone make this many blocks of a key head, keys are split less, so
// that many queries do not ask for much scratch memory.
constexpr int kPartKeys = 256, kMaxParts = 64, kSplitBlocks = 512;
constexpr int kPackedParts = 16;  // at most of a document, which has others beside it

struct DecodePlan {
  int group, rows;  // query heads of a key head; rows of each key head, packed those of all documents
  int row_blocks, max_parts;  // of kDecodeRows; of a sequence
  int parts;                  // that the grid has for each sequence: those it does not need leave at once
  bool modified, aligned;
};

// The keys of one sequence: parts of part_keys, a multiple of kDecodeKeys, from the first that any query sees. Computed
// by the blocks, as lengths may lie on the device; the same whatever the grid's size.
struct KeySplit {
  int begin, part_keys, parts;
};
GPTCORE_BOTH_SIDES constexpr KeySplit split_keys(int queries, int keys, int left, int max_parts) {
  const int before = keys - queries - left;
  const int begin = left < 0 || before < 0 ? 0 : before < keys ? before : keys;
  const int seen = keys - begin, even = (seen + max_parts - 1) / max_parts;
  const int part = ((even > kPartKeys ? even : kPartKeys) + kDecodeKeys - 1) / kDecodeKeys * kDecodeKeys;
  return {begin, part, seen > part ? (seen + part - 1) / part : 1};
}

// Parts that a sequence of at most so many keys may have.
constexpr int most_parts(int64_t keys, int max_parts) {
  const int64_t parts = (keys + kPartKeys - 1) / kPartKeys;
  return static_cast<int>(parts < 1 ? 1 : parts < max_parts ? parts : max_parts);
}

// Columns of the values that a block sums: f32 sums of 256, split as their operands are, want more registers than there
// are, so two blocks share them, each with scores of its own.
constexpr int decode_columns(int64_t dim, int64_t element_bytes) {
  return static_cast<int>(element_bytes == 4 && dim > 128 ? 128 : dim);
}

// Queries, also the warps' states; a tile of keys and one of values, also the warps' sums in f32; and where the keys of
// two tiles lie, a page and a place in it each.
constexpr int64_t decode_shared_bytes(int64_t dim, int64_t element_bytes, bool paged) {
  const int64_t columns = decode_columns(dim, element_bytes);
  const int64_t tiles = kDecodeKeys * (dim + columns) * element_bytes,
                sums = 4 * kDecodeWarps * kDecodeRows * columns;
  return kDecodeRows * dim * element_bytes + std::max(tiles, sums) + (paged ? 2 * kDecodeKeys * 8 : 0);
}

// A pattern's hidden keys are not skipped, and nobody drops while decoding.
inline bool decode_takes(const AttentionProblem& p) {
  if (p.keep != kKeepAll || p.stride != 0) return false;
  if (!p.cu_q) return p.queries <= kDecodeQueries;
  return p.total_q <= kDecodePacked * p.batch && p.total_q * (p.heads / p.kv_heads) <= kMaxDeviceTokens;
}

inline DecodePlan decode_plan(const AttentionProblem& p) {
  DecodePlan plan{};
  plan.group = static_cast<int>(p.heads / p.kv_heads);
  plan.rows = static_cast<int>(p.cu_q ? p.total_q : p.queries) * plan.group;
  plan.row_blocks = (plan.rows + kDecodeRows - 1) / kDecodeRows;
  plan.max_parts = std::clamp(kSplitBlocks / std::max(plan.row_blocks, 1), 1, kMaxParts);
  if (p.cu_q) {  // block cu[i] group / kDecodeRows + i is the first of document i
    plan.row_blocks = plan.rows / kDecodeRows + static_cast<int>(p.batch);
    plan.max_parts = kPackedParts;
  }
  const bool open = p.left < 0 || p.left >= p.keys;
  const int64_t seen = open ? p.keys : std::min(p.keys, p.queries + p.left);
  plan.parts = most_parts(seen, plan.max_parts);
  if (!p.pages.table && !p.cu_q) {
    const int left = static_cast<int>(open ? -1 : p.left);
    plan.parts =
        split_keys(static_cast<int>(p.queries), static_cast<int>(p.keys), left, plan.max_parts).parts;
  }
  plan.modified = p.modified || !(p.scale > 0.0f);
  return plan;
}

}  // namespace gptcore::cuda
