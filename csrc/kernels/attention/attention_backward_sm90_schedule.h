// Who computes what, when, in attention's backward for sm_90: tiles of keys and of queries, their order, and the shared
// memory of a block. Arithmetic alone, the same on both sides of a launch.
//
// A block owns a tile of keys of one member (a sequence and a key head) and goes over the tiles of queries that see any
// of them, the last first, for each query head of the group in turn. Every tile of queries gets its dQ from the tiles of
// keys it sees in their own order, each waiting for the one before: the same sums in every run. Blocks are numbered so
// that a block waits for earlier ones only, and hardly:
//
//   - of one member the tile with the lower number comes first, with causal masks the one with most work;
//   - all blocks begin at the last queries, so that one is a tile behind the other (two under a window) and stays so;
//   - members take turns, as many as the second-level cache has room for: the next tile of keys starts a few tiles later
//     anyway, and the short blocks come at the end.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

namespace gptcore::cuda::backward_sm90 {

struct TileRange {
  int begin, end;
};

struct Schedule {
  int queries, keys;             // of a sequence
  int left, right;               // window; negative: unbounded
  int query_tile, key_tile;      // rows of a tile
  int group;                     // query heads that share a key head
  int members, members_abreast;  // pairs of sequence and key head; those that take turns

  __host__ __device__ int shift() const { return keys - queries; }
  __host__ __device__ int query_tiles() const { return (queries + query_tile - 1) / query_tile; }
  __host__ __device__ int key_tiles() const { return (keys + key_tile - 1) / key_tile; }
  __host__ __device__ int64_t blocks() const { return int64_t{members} * key_tiles(); }

  // Tiles of queries with a row that sees a key of this tile; may hold one that just misses it.
  __host__ __device__ TileRange queries_of(int tile) const {
    const int begin = tile * key_tile, end = smaller(begin + key_tile, keys);
    const int first = right < 0 ? 0 : larger(begin - shift() - right, 0);
    const int last = left < 0 ? queries : smaller(end - shift() + left, queries);
    return {first / query_tile, last <= 0 ? 0 : (last + query_tile - 1) / query_tile};
  }

  // The first tile of keys that has this tile of queries in its range. Both ends of the ranges grow with the tile of
  // keys, so those that have it are neighbours, and tile k of them is number k - first_key_tile to add to its dQ.
  __host__ __device__ int first_key_tile(int tile) const {
    if (left < 0) return 0;
    const int reach = tile * query_tile + shift() - left;
    return reach <= 0 ? 0 : reach / key_tile;
  }

  struct Place {
    int member, tile;
  };
  // Of a block: members abreast fastest, then tiles of keys, then the next members.
  __host__ __device__ Place place_of(int block) const {
    const int round = members_abreast * key_tiles();
    const int first = block / round * members_abreast, within = block % round;
    const int abreast = smaller(members_abreast, members - first);
    return {first + within % abreast, within / abreast};
  }

  __host__ __device__ static int smaller(int a, int b) { return a < b ? a : b; }
  __host__ __device__ static int larger(int a, int b) { return a > b ? a : b; }
};

// Members that take turns: their q, dout and sums of dQ stay in half of an H200's second-level cache.
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
  static constexpr int kBox = 64;  // columns
  static constexpr int kBoxes = D / kBox;

  static constexpr int kKeyBox = kKeys * kBox * 2, kQueryBox = kQueries * kBox * 2;
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
  static constexpr int kSharedBytes = kBarriers + 8 * kBarrierCount;
};

static_assert(TileShape<64>::kDqElements == 64 * 64 && TileShape<128>::kDqElements == 64 * 64);
static_assert(TileShape<64>::kSharedBytes <= 227 << 10 && TileShape<128>::kSharedBytes <= 227 << 10);

}  // namespace gptcore::cuda::backward_sm90
