// Which rows a group of threads takes, of blocks that stay for many rows: they go to blocks, or clusters, first and to
// the groups of a block then, so that the last ones are on all blocks. And which of a row's elements a thread takes.
#pragma once

#include "core/cuda/launch.cuh"

namespace gptcore::cuda {

struct RowWalk {
  int block;     // or cluster
  int64_t mine;  // this group's first row
  int stride;    // from that to its next one
  int leader;    // to the first one of this warp, whose lanes go on together: 0 or less
  int lanes, rank, ranks;

  __device__ __forceinline__ explicit RowWalk(int cluster) {
    const auto size = static_cast<unsigned>(cluster);
    const int blocks = static_cast<int>(gridDim.x / size);
    block = static_cast<int>(blockIdx.x / size);
    lanes = static_cast<int>(blockDim.x), rank = static_cast<int>(blockIdx.x % size), ranks = cluster;
    const int group = static_cast<int>(threadIdx.y);
    mine = group * blocks + block, stride = blocks * static_cast<int>(blockDim.y);
    leader = lanes < kWarp ? -(group & (kWarp / lanes - 1)) * blocks : 0;
  }

  // A thread's first element, and how far it is to its next pack.
  template <int kCount>
  __device__ __forceinline__ int first() const {
    return (rank * lanes + static_cast<int>(threadIdx.x)) * kCount;
  }
  template <int kCount>
  __device__ __forceinline__ int step() const {
    return lanes * ranks * kCount;
  }
};

}  // namespace gptcore::cuda
