// How CUDA cuts matrices for Adafactor, as pure functions. A block of 256 threads takes a chunk: some rows, or a tile of
// their columns, several rows at once. A row has `threads` threads with `fours` times four columns each.
#pragma once

#include <cstdint>

namespace gptcore {

constexpr int kTileThreads = 256;
constexpr int64_t kTileElements = 65536;  // of a chunk, about
constexpr int64_t kTileSteps = 64;        // rows of a chunk that one thread sees, at most
constexpr int64_t kTileRows = kTileSteps * (kTileThreads / 32);
constexpr int64_t kFactorThreads = 256;  // rows or columns whose states one block moves on

// Rows that threads hold in registers: up to four fours to a thread. A chunk has no fewer than kHeldRows of them, so that
// the sums of its columns are few beside it.
constexpr int kHeldFours = 4;
constexpr int64_t kHeldCols = int64_t{4} * kHeldFours * kTileThreads, kHeldRows = 32;

constexpr int64_t tiles_of(int64_t size, int64_t tile) { return (size + tile - 1) / tile; }

// Threads to a row of tiles: the most of 256, 128, 64 and 32 of which nine in ten have columns, else those with most use.
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
  int threads, fours;                // to a row
  int64_t rows, cols;                // of a chunk
  int64_t row_blocks, col_blocks;    // of a matrix
  int64_t factor_rows, factor_cols;  // blocks that move the states of a matrix on
};

constexpr AdafactorTiling cut(int64_t rows, int64_t cols, int threads, int fours, int64_t tile_rows,
                              int64_t tile_cols) {
  return {threads,
          fours,
          tile_rows,
          tile_cols,
          tiles_of(rows, tile_rows),
          tiles_of(cols, tile_cols),
          tiles_of(rows, kFactorThreads),
          tiles_of(cols, kFactorThreads)};
}

// Of a matrix of whole rows in registers, at most kHeldCols columns wide.
constexpr AdafactorTiling held_tiling_of(int64_t rows, int64_t cols) {
  int threads = 32;
  while (int64_t{4} * kHeldFours * threads < cols) threads *= 2;
  const int64_t groups = kTileThreads / threads, least = tiles_of(kHeldRows, groups);
  int64_t steps = kTileElements / (groups * (cols > 0 ? cols : 1));
  steps = steps < least ? least : steps;
  steps = steps > kTileSteps ? kTileSteps : steps;
  return cut(rows, cols, threads, static_cast<int>(tiles_of(cols, int64_t{4} * threads)), groups * steps,
             cols > 0 ? cols : 1);
}

// Of a matrix in tiles of columns; what is not factored has rows 1 and is cut into runs of kTileElements.
constexpr AdafactorTiling tiling_of(int64_t rows, int64_t cols, bool factored) {
  if (!factored) return {kTileThreads, 1, 1, kTileElements, rows, tiles_of(cols, kTileElements), 0, 0};
  const int threads = row_threads(cols);
  return cut(rows, cols, threads, 1, kTileSteps * (kTileThreads / threads), int64_t{4} * threads);
}

}  // namespace gptcore
