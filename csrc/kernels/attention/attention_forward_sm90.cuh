// What surrounds the forward kernel for sm_90: its sizes, the order of its tiles, and how the copy engine is told of q,
// k and v. A tile is kQueries queries of one head.
#pragma once

#include "core/cuda/tensor_map.h"
#include "kernels/attention/attention_masks.cuh"

namespace gptcore::cuda {

// --- sizes -----------------------------------------------------------------------------------------------------

constexpr int kForwardQueries = 128;  // of a tile: 64 for each of two warpgroups
constexpr int kForwardThreads = 384;  // and a third warpgroup that loads
constexpr int kForwardPanel = 64;     // columns of a tile's panels: 128 bytes

// Head sizes are padded with zeros to kDim: 64, 96, 128, 192 or 256; in shared memory to whole panels.
template <int kDim>
struct ForwardSizes {
  // Of a block: S, P and O fit a thread's 240 registers.
  static constexpr int kKeys = kDim > 192 ? 64 : kDim > 128 ? 96 : 128;
  static constexpr int kStages = kDim > 128 ? 2 : kDim > 64 ? 3 : 4;
  static constexpr int kColumns = (kDim + kForwardPanel - 1) / kForwardPanel * kForwardPanel;
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

// --- q, k and v for the copy engine ----------------------------------------------------------------------------
//
// Five dimensions: column, token, head and two that say which sequence. Of packed documents the engine must not bring
// the next one's tokens behind the last, which would multiply zero probabilities and may be infinite. So tokens end at
// kRaggedEnd, wherever that is: token t of a document of n from `begin` on is at (kRaggedEnd - n + t, begin + n,
// kRaggedEnd) of dimensions with strides s, s and 2^34 - s, whose sum is (begin + t) s + 2^64, and addresses wrap.

constexpr int kRaggedEnd = 1 << 30;

inline TensorBoxes forward_boxes(const AttentionTensor& t, DType dtype, int64_t tokens, int64_t heads,
                                 const AttentionProblem& p, int box_tokens) {
  TensorBoxes b{t.data, dtype, 5, {}, {}, {kForwardPanel, box_tokens, 1, 1, 1}, 2 * kForwardPanel};
  b.sizes[0] = p.head_dim, b.sizes[2] = heads;
  b.strides[0] = 1, b.strides[1] = t.token, b.strides[2] = t.head;
  b.sizes[1] = p.cu_q ? kRaggedEnd : tokens;
  b.sizes[3] = p.cu_q ? 0x7fff0000 : p.batch, b.strides[3] = p.cu_q ? t.token : t.batch;
  b.sizes[4] = p.cu_q ? 0x7fff0000 : 1, b.strides[4] = p.cu_q ? (int64_t{1} << 34) - t.token : 0;
  return b;
}

// Coordinates of a sequence's first token, the column and the head left out.
struct ForwardPlace {
  int token, at[2];
};
__device__ inline ForwardPlace forward_place(bool packed, int index, int64_t begin, int tokens) {
  if (!packed) return {0, {index, 0}};
  return {kRaggedEnd - tokens, {static_cast<int>(begin) + tokens, kRaggedEnd}};
}

}  // namespace gptcore::cuda
