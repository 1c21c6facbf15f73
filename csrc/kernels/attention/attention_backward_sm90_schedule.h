// Who computes what, when, in attention's backward for sm_90: tiles of keys and of queries, their order, and the shared
// memory of a block. Arithmetic alone, the same on both sides of a launch.
//
// A block owns a tile of keys of one sequence and key head and goes over the tiles of queries that see any of them, the
// last first, for each query head of the group in turn. Every tile of queries gets its dQ from the tiles of keys it sees
// in their own order, each waiting for the one before: the same sums in every run. Blocks are numbered so that a block
// waits for earlier ones only, and hardly:
//
//   - of one sequence and head the tile with the lower number comes first, with causal masks the one with most work;
//   - all blocks begin at the last queries, so that one is a tile behind the other (two under a window) and stays so;
//   - heads take turns, as many as the second-level cache has room for: the next tile of keys starts a few tiles later
//     anyway, and the short blocks come at the end.
#pragma once

#include "kernels/attention/attention_masks.cuh"

namespace gptcore::cuda::backward_sm90 {

struct TileRange {
  int begin, end;
};

// Tiles of queries with a row that sees a key of this tile; may hold one that just misses it.
__host__ __device__ inline TileRange queries_of(const AttentionSequence& s, int key_tile, int keys,
                                                int queries) {
  const KeyRange seen = s.queries_of_keys(key_tile * keys, min((key_tile + 1) * keys, s.keys));
  return {seen.begin / queries, (seen.end + queries - 1) / queries};
}

// The first tile of keys that has this tile of queries in its range. Both ends of the ranges grow with the tile of keys,
// so those that have it are neighbours, and tile k of them is number k - first_key_tile to add to its dQ.
__host__ __device__ inline int first_key_tile(const AttentionSequence& s, int query_tile, int keys,
                                              int queries) {
  return s.keys_of(query_tile * queries).begin / keys;
}

// Members abreast fastest, then tiles of keys, then the next members. A member is a sequence and a key head; of packed
// documents, whose tiles only the device can tell apart, a key head with all of them.
struct BlockOrder {
  int members, abreast;  // all; those that take turns
  int tiles;             // of keys

  struct Place {
    int member, tile;
  };
  __host__ __device__ int64_t blocks() const { return int64_t{members} * tiles; }
  __host__ __device__ Place place_of(int block) const {
    const int round = abreast * tiles;
    const int first = block / round * abreast, within = block % round;
    const int here = min(abreast, members - first);
    return {first + within % here, within / here};
  }
};

// Members that take turns: their q, dout and sums of dQ stay in half of an H200's second-level cache. Of packed documents
// one of each member is under way, of which the host knows the mean length.
inline int members_abreast(int64_t queries, int64_t group, int64_t head_dim, int64_t members) {
  constexpr int64_t kRoom = int64_t{24} << 20;
  const int64_t bytes = queries * group * head_dim * (2 + 2 + 4);
  const int64_t fit = kRoom / (bytes > 0 ? bytes : 1);
  return static_cast<int>(fit < 1 ? 1 : fit < members ? fit : members);
}

// One block's tiles and where they lie in its shared memory; offsets in bytes. D is 64 or 128. Tiles of 16-bit elements
// are boxes of 64 columns, 128 bytes a row, as the copy engine swizzles them.
template <int D>
struct TileShape {
  static_assert(D == 64 || D == 128);
  static constexpr int kConsumers = 2;  // warpgroups, each with 64 keys
  static constexpr int kKeys = 64 * kConsumers;
  // Sums of dK and dV take D registers of a thread, scores and their gradients a tile's rows: 192 together.
  static constexpr int kQueries = D == 64 ? 128 : 64;
  static constexpr int kStages = 2;
  static constexpr int kThreads = 128 * (1 + kConsumers);

  static constexpr int kKeyBytes = kKeys * D * 2, kQueryBytes = kQueries * D * 2;
  static constexpr int kRowBytes = kQueries * 4;  // of lse or delta
  static constexpr int kGradientBytes = kKeys * kQueries * 2;
  static constexpr int kDqElements = kQueries * D / kConsumers;  // that one warpgroup computes: 64 x 64

  static constexpr int kK = 0, kV = kK + kKeyBytes;
  static constexpr int kQ = kV + kKeyBytes, kDout = kQ + kStages * kQueryBytes;
  static constexpr int kDs = kDout + kStages * kQueryBytes;  // two, in turn
  static constexpr int kDq = kDs + 2 * kGradientBytes;
  static constexpr int kLse = kDq + kConsumers * kDqElements * 4, kDelta = kLse + kStages * kRowBytes;
  static constexpr int kBarriers = kDelta + kStages * kRowBytes;
  static constexpr int kBarrierCount = 2 + 4 * kStages;
  static constexpr int kWork = kBarriers + 8 * kBarrierCount, kWorkBytes = 128;  // what it works on
  static constexpr int kSharedBytes = kWork + kWorkBytes;
};

static_assert(TileShape<64>::kDqElements == 64 * 64 && TileShape<128>::kDqElements == 64 * 64);
static_assert(TileShape<64>::kSharedBytes <= 227 << 10 && TileShape<128>::kSharedBytes <= 227 << 10);

}  // namespace gptcore::cuda::backward_sm90
