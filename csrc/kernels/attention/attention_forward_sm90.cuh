// What surrounds the forward kernel for sm_90: its sizes and the order of its tiles. A tile is kQueries queries of one
// head.
#pragma once

#include "kernels/attention/attention_boxes.cuh"

namespace gptcore::cuda {

// --- sizes -----------------------------------------------------------------------------------------------------

constexpr int kForwardQueries = 128;  // of a tile: 64 for each of two warpgroups
constexpr int kForwardThreads = 384;  // and a third warpgroup that loads

// Head sizes are padded with zeros to kDim: 64, 96, 128, 192 or 256; in shared memory to whole panels.
template <int kDim>
struct ForwardSizes {
  // Of a block: S, P and O fit a thread's 240 registers.
  static constexpr int kKeys = kDim > 192 ? 64 : kDim > 128 ? 96 : 128;
  static constexpr int kStages = kDim > 128 ? 2 : kDim > 64 ? 3 : 4;
  static constexpr int kColumns = (kDim + kPanelColumns - 1) / kPanelColumns * kPanelColumns;
  static constexpr int kQueryBytes = kForwardQueries * kColumns * 2;
  static constexpr int kKeyBytes = kKeys * kColumns * 2;
};

// --- the order of tiles ----------------------------------------------------------------------------------------
//
// Blocks take tiles in this order, each the next when it is done with one. Heads go in sections whose keys and values
// fit the L2 cache together, since a tile computes 128 times while it reads a key, less than device memory asks for.
// Within a section tiles with many keys come first, so that the last ones to be begun are short. Packed documents, whose
// lengths only the device knows, go one after the other.

struct ForwardTiles {
  int count;
  int per_head;       // tiles of a head's queries; 0 where packed
  int units, in_one;  // key heads of all sequences, and how many make a section
  int kv_heads, group;
};

constexpr int64_t kForwardSectionBytes = 32 << 20;

inline ForwardTiles forward_tiles(const AttentionProblem& p) {
  ForwardTiles t{};
  t.kv_heads = static_cast<int>(p.kv_heads), t.group = static_cast<int>(p.heads / p.kv_heads);
  const int64_t tiles = attention_tiles(p.cu_q, p.total_q, p.batch, p.queries, kForwardQueries);
  t.count = static_cast<int>(tiles * p.heads);
  if (p.cu_q) return t;
  t.per_head = static_cast<int>(tiles / p.batch);
  t.units = static_cast<int>(p.batch * p.kv_heads);
  const int64_t unit_bytes = 4 * p.keys * p.head_dim;
  const int64_t fit = kForwardSectionBytes / unit_bytes;
  t.in_one = static_cast<int>(fit < 1 ? 1 : fit < t.units ? fit : t.units);
  return t;
}

struct ForwardTile {
  int index, head, first;  // the sequence, the query head, and the tile's first query
};

// Not for packed documents.
__host__ __device__ inline ForwardTile forward_tile(const ForwardTiles& t, int i) {
  const int section_tiles = t.in_one * t.group * t.per_head, section = i / section_tiles;
  const int first_unit = section * t.in_one, units = min(t.in_one, t.units - first_unit);
  const int rest = i - section * section_tiles, across = units * t.group;
  const int nth = rest / across, within = rest % across;
  const int unit = first_unit + within / t.group;
  return {unit / t.kv_heads, unit % t.kv_heads * t.group + within % t.group,
          (t.per_head - 1 - nth) * kForwardQueries};
}

// All lanes of a warp come.
__device__ inline ForwardTile forward_tile_of(const AttentionProblem& p, const ForwardTiles& t, int i) {
  if (!p.cu_q) return forward_tile(t, i);
  const int heads = static_cast<int>(p.heads);
  const TileOfBatch tile = tile_of_batch(p.cu_q, p.batch, p.queries, kForwardQueries, i / heads);
  return {tile.index, i % heads, tile.first};
}

}  // namespace gptcore::cuda
