// How CUDA sorts ids: by digits from the lowest on, a stable pass each, tiles of ids to blocks. Plain C++, for the host.
#pragma once

#include <cstdint>

namespace gptcore::cuda {

constexpr int kSortThreads = 512;
constexpr int kSortRounds = 8;                            // ids of a thread
constexpr int kSortTile = kSortThreads * kSortRounds;     // of a block
constexpr int kDigitBits = 9, kDigits = 1 << kDigitBits;  // a thread of the block for each digit
static_assert(kDigits == kSortThreads);

struct SortPlan {
  int64_t tiles;
  int passes;
};

// Ids outside the table count as `vocabulary`, so digits have to hold that.
constexpr SortPlan sort_plan(int64_t tokens, int64_t vocabulary) {
  SortPlan p{(tokens + kSortTile - 1) / kSortTile, 1};
  while (vocabulary >> (p.passes * kDigitBits)) ++p.passes;
  return p;
}

}  // namespace gptcore::cuda
