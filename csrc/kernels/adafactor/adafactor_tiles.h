// How CUDA cuts matrices for Adafactor, as pure functions: tiles of rows of `threads` times four columns, of which a block
// of 256 threads takes several rows at once.
#pragma once

#include <cstdint>

namespace gptcore {

constexpr int kTileThreads = 256;
constexpr int64_t kTileElements = 65536;  // of a chunk, the work of one block
constexpr int64_t kTileSteps = 64;        // rows of a chunk that one thread sees
constexpr int64_t kFactorThreads = 256;   // rows or columns whose states one block moves on

constexpr int64_t tiles_of(int64_t size, int64_t tile) { return (size + tile - 1) / tile; }

// Threads to a row: the most of 256, 128, 64 and 32 of which nine in ten have columns, else those with most use.
constexpr int row_threads(int64_t cols) {
  int best = 32;
  double most = 0;
  for (int threads = kTileThreads; threads >= 32; threads /= 2) {
    const int64_t tile = int64_t{4} * threads;
    const double use = static_cast<double>(cols) / static_cast<double>(tiles_of(cols, tile) * tile);
    if (use >= 0.9) return threads;
    if (use > most) most = use, best = threads;
  }
  return best;
}

struct AdafactorTiling {
  int threads;                       // to a row
  int64_t rows, cols;                // of a chunk
  int64_t row_blocks, col_blocks;    // of a matrix
  int64_t factor_rows, factor_cols;  // blocks that move the states of a matrix on
};

// Of a matrix; what is not factored has rows 1 and is cut into runs of kTileElements.
constexpr AdafactorTiling tiling_of(int64_t rows, int64_t cols, bool factored) {
  if (!factored) return {kTileThreads, 1, kTileElements, rows, tiles_of(cols, kTileElements), 0, 0};
  const int threads = row_threads(cols);
  const int64_t tile_rows = kTileSteps * (kTileThreads / threads), tile_cols = int64_t{4} * threads;
  return {threads,
          tile_rows,
          tile_cols,
          tiles_of(rows, tile_rows),
          tiles_of(cols, tile_cols),
          tiles_of(rows, kFactorThreads),
          tiles_of(cols, kFactorThreads)};
}

}  // namespace gptcore
