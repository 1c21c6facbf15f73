// How the router's work is cut on CUDA: fixed by the shape alone, so that sums over tokens are the same bits on every
// device. Plain C++.
#pragma once

#include <cstdint>

namespace gptcore::cuda {

struct RouterPlan {
  int lanes;              // that share a token
  int threads;            // of a block that chooses
  int64_t chunk, chunks;  // tokens a block, and how many blocks
};

constexpr int64_t kRouterLeastChunk = 32;

// Numbers of shared memory for one token at work: its logits and the sums of its block's probabilities.
inline int64_t router_shared_bytes(const RouterPlan& plan, int64_t experts) {
  const int64_t groups = plan.threads / plan.lanes;
  return (2 * groups * experts + 3 * groups) * 4;
}

inline RouterPlan router_plan(int64_t tokens, int64_t experts, int64_t choices) {
  // Counts of every chunk, choice and expert are kept: 64 MB at most.
  constexpr int64_t kMostCounts = int64_t{1} << 24, kMostChunks = 512, kFewestChunks = 16;
  RouterPlan plan{};
  plan.lanes = experts <= 8 ? 8 : 32;
  plan.threads = experts <= 1024 ? 256 : experts <= 2048 ? 128 : 64;
  int64_t most = kMostCounts / ((choices + 1) * experts);
  most = most > kMostChunks ? kMostChunks : most < kFewestChunks ? kFewestChunks : most;
  const int64_t wanted = (tokens + most - 1) / most;
  plan.chunk = (wanted + kRouterLeastChunk - 1) / kRouterLeastChunk * kRouterLeastChunk;
  if (plan.chunk < kRouterLeastChunk) plan.chunk = kRouterLeastChunk;
  plan.chunks = (tokens + plan.chunk - 1) / plan.chunk;
  return plan;
}

// Sorting by priority: tiles of this many keys, a power of two.
constexpr int64_t kMostTileKeys = 2048;

inline int64_t tile_keys(int64_t tokens) {
  int64_t keys = 64;
  while (keys < tokens && keys < kMostTileKeys) keys *= 2;
  return keys;
}

}  // namespace gptcore::cuda
