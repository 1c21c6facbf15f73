// How norms cut their rows over threads, packs in registers, blocks and clusters. Plain C++, for the host.
//
// What a row's sums look like depends on its width and the architecture alone, never on how many rows there are, so
// that a row's bits do not know its batch; how many blocks sum the gradients of the weights, on the shape.
#pragma once

#include <cstdint>

namespace gptcore::cuda {

struct NormPlan {
  int packs = 0;    // of a row that a thread holds in registers; 0: rows are too wide and read again
  int lanes = 0;    // threads of a block that share a row: a power of two up to 32, or whole warps
  int groups = 1;   // rows that a block has at the same time
  int cluster = 1;  // blocks that share a row
  int64_t blocks = 0;

  constexpr int threads() const { return lanes * groups; }
};

constexpr int kNormThreads = 512;  // that a block may have
constexpr int kNormCluster = 8;    // blocks of a cluster that every device takes

constexpr int64_t divided_up(int64_t x, int64_t by) { return (x + by - 1) / by; }

// `most` packs a thread, for rows of `row_packs`; blocks of about `threads` where rows are short.
constexpr NormPlan norm_rows(int64_t row_packs, int most, int threads, int arch) {
  NormPlan p;
  if (row_packs <= 32) {
    p.packs = 1, p.lanes = 1;
    while (p.lanes < row_packs) p.lanes *= 2;
  } else {
    p.packs = most;
    while (p.packs > 2 && row_packs <= 16 * p.packs) p.packs /= 2;
    while (p.cluster < kNormCluster && row_packs > int64_t{kNormThreads} * most * p.cluster) p.cluster *= 2;
    const int64_t lanes = divided_up(divided_up(row_packs, p.packs * p.cluster), 32) * 32;
    if (lanes > kNormThreads || (p.cluster > 1 && arch < 90)) return {0, kNormThreads, 1, 1, 0};
    p.lanes = static_cast<int>(lanes);
  }
  if (p.lanes < threads) p.groups = threads / p.lanes;
  return p;
}

// A block for as many rows as it has at the same time: the hardware deals blocks out as they end.
constexpr NormPlan norm_forward_plan(int64_t rows, int64_t row_packs, int arch) {
  NormPlan p = norm_rows(row_packs, 4, 128, arch);
  if (p.lanes > 32) p.groups = 1;
  p.blocks = divided_up(rows, p.groups) * p.cluster;
  return p;
}

// So many blocks, or clusters, that they fill a device of 132 multiprocessors once, each with its part of the sums over
// rows; one alone where a second kernel to add such parts would take longer than the rows.
constexpr NormPlan norm_backward_plan(int64_t rows, int64_t width, int64_t row_packs, int arch) {
  NormPlan p = norm_rows(row_packs, 2, 256, arch);
  int64_t most = (p.threads() > 256 ? 132 : 264) / p.cluster;
  if (p.packs == 0 && most > (int64_t{8} << 20) / width) most = (int64_t{8} << 20) / width;
  const int64_t wanted = divided_up(rows, p.groups);
  p.blocks = wanted < most ? wanted : most;
  if (p.blocks < 1 || (rows * width <= 16384 && p.packs)) p.blocks = 1;
  p.blocks *= p.cluster;
  return p;
}

}  // namespace gptcore::cuda
