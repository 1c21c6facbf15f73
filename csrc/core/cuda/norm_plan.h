// How norms cut their rows over threads, packs in registers, blocks and clusters. Plain C++, for the host.
//
// What a row's sums look like depends on its width and the architecture alone, never on how many rows there are, so
// that a row's bits do not know its batch; how many blocks sum the gradients of the weights, on the shape.
#pragma once

#include <cstdint>

#include "core/cuda/device.h"

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

// `packs` a thread for rows that a warp does not hold with one, in blocks of up to `threads`; clusters for wide rows.
constexpr NormPlan norm_rows(int64_t row_packs, int packs, int threads, int arch) {
  NormPlan p;
  if (row_packs <= 32) {
    p.packs = 1, p.lanes = 1;
    while (p.lanes < row_packs) p.lanes *= 2;
    return p;
  }
  p.packs = packs;
  while (p.cluster < kNormCluster && row_packs > int64_t{threads} * packs * p.cluster) p.cluster *= 2;
  const int64_t lanes = divided_up(divided_up(row_packs, p.packs * p.cluster), 32) * 32;
  if (lanes > threads || (p.cluster > 1 && arch < 90)) return {0, kNormThreads, 1, 1, 0};
  p.lanes = static_cast<int>(lanes);
  return p;
}

// The fewest rows worth a block: four warps of them.
constexpr int64_t norm_rows_of_a_block(const NormPlan& p) { return p.lanes < 128 ? 128 / p.lanes : 1; }

// Threads of a block of the forward pass: what the registers of a row and the next one leave.
constexpr int norm_forward_threads(int packs) { return packs > 4 ? 384 : kNormThreads; }

// A block, or cluster, for each multiprocessor, of so many threads where there are rows for them. Few of them share a
// row: what a thread does once a row is as much as two packs of it. A block has weight and bias in shared memory, of
// which some devices have too little for the widest rows: those are read again.
constexpr NormPlan norm_forward_plan(int64_t rows, int64_t row_packs, const DeviceLimits& device) {
  const int packs = row_packs <= 64 ? 2 : row_packs <= 128 ? 4 : 8, threads = norm_forward_threads(packs);
  NormPlan p = norm_rows(row_packs, packs, threads, device.arch);
  if (p.packs == 0 || int64_t{p.lanes} * p.packs * 64 + 1024 > device.shared_bytes)
    return {0, kNormThreads, 1, 1, rows};
  const int64_t most = device.multiprocessors > p.cluster ? device.multiprocessors / p.cluster : 1;
  if (p.cluster == 1) {
    const int64_t least = norm_rows_of_a_block(p), full = threads / p.lanes;
    const int64_t groups = divided_up(divided_up(rows, most), least) * least;
    p.groups = static_cast<int>(groups < least ? least : groups < full ? groups : full);
  }
  const int64_t wanted = divided_up(rows, p.groups);
  p.blocks = (wanted < most ? wanted : most) * p.cluster;
  return p;
}

// Threads of a block of the backward pass, which has a multiprocessor to itself: what the registers of so many packs a
// thread (of the row, of the next one, of the weight and the sums) leave.
constexpr int norm_backward_threads(int packs) { return packs == 1 ? 640 : packs == 2 ? 512 : 384; }

constexpr int64_t norm_backward_rows_at_once(int64_t row_packs, int packs) {
  return norm_backward_threads(packs) / 32 / divided_up(row_packs, 32 * packs);
}

// A block, or cluster, for each of 132 multiprocessors, each with its part of the sums over rows; one alone where a
// second kernel to add such parts would take longer than the rows. Packs a thread: with which more rows are under way.
constexpr NormPlan norm_backward_plan(int64_t rows, int64_t width, int64_t row_packs, int arch) {
  const int packs =
      norm_backward_rows_at_once(row_packs, 3) > norm_backward_rows_at_once(row_packs, 2) ? 3 : 2;
  NormPlan p = norm_rows(row_packs, packs, norm_backward_threads(packs), arch);
  if (p.packs && p.cluster == 1) p.groups = norm_backward_threads(p.packs) / p.lanes;
  int64_t most = 132 / p.cluster;
  if (p.packs == 0 && most > (int64_t{8} << 20) / width) most = (int64_t{8} << 20) / width;
  const int64_t wanted = divided_up(rows, norm_rows_of_a_block(p));
  p.blocks = wanted < most ? wanted : most;
  if (p.blocks < 1 || (rows * width <= 16384 && p.packs)) p.blocks = 1;
  p.blocks *= p.cluster;
  return p;
}

}  // namespace gptcore::cuda
