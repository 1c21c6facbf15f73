// A grid over rows of packs for kernels whose threads have a column of packs each: a block is `lanes` columns of
// `groups` rows, the grid `across` by `down` of them.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

namespace gptcore::cuda {

struct GridOfRows {
  int lanes, groups;
  int64_t across, down;

  dim3 grid() const { return dim3(static_cast<unsigned>(across), static_cast<unsigned>(down)); }
  dim3 block() const { return dim3(static_cast<unsigned>(lanes), static_cast<unsigned>(groups)); }
};

// Blocks of about `threads`, at most `most_down` of them below each other: threads go on with later rows.
constexpr GridOfRows grid_of_rows(int64_t rows, int64_t row_packs, int threads, int64_t most_down) {
  GridOfRows g{1, 1, (row_packs + threads - 1) / threads, 0};
  if (row_packs <= 32) {
    while (g.lanes < row_packs) g.lanes *= 2;
  } else {
    g.lanes = static_cast<int>(((row_packs + g.across - 1) / g.across + 31) / 32 * 32);
  }
  g.groups = threads / g.lanes;
  const int64_t wanted = (rows + g.groups - 1) / g.groups;
  g.down = wanted < most_down ? wanted : most_down;
  return g;
}

}  // namespace gptcore::cuda
