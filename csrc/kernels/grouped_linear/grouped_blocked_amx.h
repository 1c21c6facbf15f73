// A block of an expert's bf16 product on AMX; docs/kernels/grouped_linear.md has the measurements behind its shape.
// The levels, from the outside:
//
//   pass    a stretch of depth; the block's rows (of x or dy), packed, take at most 768 KB of L2; sums wait in f32
//           between passes
//   slab    columns packed at a time, while the next slab's lines are fetched from memory
//   strip   64 columns x all rows: its 8 steps at a time stay in L1, rows stream from L2
//   pair    32 x 32 sums in four tiles over 8 steps
//
// An element's sum is one chain over k whatever the cut.
//
// y = x weight^T, whose operands both lie along the depth, is made as its transpose: the weight is the A operand,
// which is packed by plain copies, and what has to be transposed is x and y, smaller than the weights where experts
// are many.
#pragma once

#include "core/arena.h"
#include "core/gemm_pack_amx.h"
#include "core/stream.h"
#include "kernels/grouped_linear/grouped_memory.h"

namespace gptcore {
namespace GPTCORE_ISA_NS {
namespace {

constexpr int64_t kMostRows = 512;
constexpr int64_t kPackedRowsBytes = 768 << 10;
constexpr int64_t kStripPairs = 2, kStripColumns = kStripPairs * kPair;
constexpr int64_t kBlockSteps = 8;
// A slab of lines along the depth is one strip, of whole lines where one pass does; lines across it are read in
// stretches as long as L2 has room for.
constexpr int64_t kAlongSteps = 96;
constexpr int64_t kAcrossSteps = 16, kAcrossColumns = 192;
constexpr int64_t kOnePassColumns = 3072, kWaitingColumns = 768;  // of a block
constexpr int64_t kTileFloats = 256;
constexpr int64_t kPairFloats = 4 * kTileFloats;  // tiles 00 01 10 11, each contiguous

// Tile loads that ask not to be kept in L1, for the operand that streams.
#define GPTCORE_LOAD(streams, tile, from, line) \
  do {                                          \
    if constexpr (streams) {                    \
      _tile_stream_loadd(tile, from, line);     \
    } else {                                    \
      _tile_loadd(tile, from, line);            \
    }                                           \
  } while (0)

// Where tiles of A or B lie, packed or where they are in the matrix: bytes from line to line, to a pair's second tile,
// from step to step and from pair to pair.
struct Tiles {
  const char* at;
  int64_t line, second, step, pair;
};

// 32 x 32 sums c = or += a pair of A x a pair of B; of A or of B, whichever streams, the second tile may be left out.
template <bool kStreamA, bool kBoth>
GPTCORE_INLINE void multiply_pair(const Tiles& tiles, const char* b, int64_t steps, float* c, bool add,
                                  Fetch& next) {
  const char* a = tiles.at;
  const int64_t line = tiles.line, second = tiles.second, step = tiles.step;
  constexpr bool kBothA = kBoth || !kStreamA, kBothB = kBoth || kStreamA;
  if (add) {
    _tile_loadd(0, c, kLine);
    if constexpr (kBothB) _tile_loadd(1, c + kTileFloats, kLine);
    if constexpr (kBothA) _tile_loadd(2, c + 2 * kTileFloats, kLine);
    if constexpr (kBothA && kBothB) _tile_loadd(3, c + 3 * kTileFloats, kLine);
  } else {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
  }
  for (int64_t s = 0; s < steps; ++s, a += step, b += kPairBytes) {
    GPTCORE_LOAD(!kStreamA, 6, b, kLine);
    GPTCORE_LOAD(kStreamA, 4, a, line);
    _tile_dpbf16ps(0, 4, 6);
    if constexpr (kBothA) {
      GPTCORE_LOAD(kStreamA, 5, a + second, line);
      _tile_dpbf16ps(2, 5, 6);
    }
    if constexpr (kBothB) {
      GPTCORE_LOAD(!kStreamA, 7, b + kStepBytes, kLine);
      _tile_dpbf16ps(1, 4, 7);
      if constexpr (kBothA) _tile_dpbf16ps(3, 5, 7);
    }
    fetch_some(next);
  }
  _tile_stored(0, c, kLine);
  if constexpr (kBothA) _tile_stored(2, c + 2 * kTileFloats, kLine);
  if constexpr (kBothB) _tile_stored(1, c + kTileFloats, kLine);
  if constexpr (kBothA && kBothB) _tile_stored(3, c + 3 * kTileFloats, kLine);
}

#undef GPTCORE_LOAD

// A piece of the result of at most 32 x 32.
struct Piece {
  int64_t row, rows, column, columns;
};

GPTCORE_INLINE Vec with_output(const GroupProduct& p, Vec value, int64_t offset, int64_t lanes) {
  if (p.f32_out) return value + load_n(static_cast<const float*>(p.out) + offset, lanes);
  return value + load_n(static_cast<const bf16*>(p.out) + offset, lanes);
}

inline void put_rows(const GroupProduct& p, const Piece& at, const float* c, bool streams) {
  const int64_t left = smaller(at.columns, kGroup), right = at.columns - left;
  for (int64_t r = 0; r < at.rows; ++r) {
    const float* line = c + r / kGroup * (2 * kTileFloats) + r % kGroup * kGroup;
    Vec low = load(line), high = load(line + kTileFloats);
    const int64_t offset = (at.row + r) * p.out_stride + at.column;
    if (p.accumulate) {
      low = with_output(p, low, offset, left);
      if (right > 0) high = with_output(p, high, offset + kGroup, right);
    }
    if (p.f32_out) {
      float* out = static_cast<float*>(p.out) + offset;
      if (right == kGroup && streams) {
        stream(out, low, high);
        continue;
      }
      store_n(out, low, left);
      if (right > 0) store_n(out + kGroup, high, right);
      continue;
    }
    bf16* out = static_cast<bf16*>(p.out) + offset;
    if (right == kGroup && streams) {
      stream(out, low, high);
    } else if (right == kGroup) {
      *reinterpret_cast<Line32Unaligned*>(out) = (Line32)_mm512_cvtne2ps_pbh((__m512)high, (__m512)low);
    } else {
      store_n(out, low, left);
      if (right > 0) store_n(out + kGroup, high, right);
    }
  }
}

GPTCORE_INLINE float bias_at(const GroupProduct& p, int64_t n) {
  return p.f32_bias ? static_cast<const float*>(p.bias)[n] : widen(static_cast<const bf16*>(p.bias)[n]);
}

// The sums hold the piece's transpose: 32 columns of the result by 32 rows, in tiles of 16. Two columns side by side
// are words of bf16 pairs, and 16 x 16 of these words transposed are 16 rows of 32 columns.
inline void put_transposed(const GroupProduct& p, const Piece& at, const float* c, bool streams) {
  alignas(64) static constexpr uint16_t kSideBySide[32] = {0,  16, 1,  17, 2,  18, 3,  19, 4,  20, 5,
                                                           21, 6,  22, 7,  23, 8,  24, 9,  25, 10, 26,
                                                           11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
  const __m512i order = _mm512_load_si512(kSideBySide);
  for (int64_t half = 0; half * kGroup < at.rows; ++half) {
    const float* tiles = c + half * kTileFloats;
    Line32 words[16];
#pragma GCC unroll 16
    for (int i = 0; i < 16; ++i) {
      const float* line = tiles + i / 8 * (2 * kTileFloats) + i % 8 * (2 * kGroup);
      Vec even = load(line), odd = load(line + kGroup);
      if (p.bias) {
        if (2 * i < at.columns) even += bias_at(p, at.column + 2 * i);
        if (2 * i + 1 < at.columns) odd += bias_at(p, at.column + 2 * i + 1);
      }
      words[i] =
          (Line32)_mm512_permutexvar_epi16(order, (__m512i)_mm512_cvtne2ps_pbh((__m512)odd, (__m512)even));
    }
    transpose_words(words);
    const int64_t rows = smaller(kGroup, at.rows - half * kGroup);
    bf16* out = static_cast<bf16*>(p.out) + (at.row + half * kGroup) * p.out_stride + at.column;
    for (int64_t r = 0; r < rows; ++r, out += p.out_stride) {
      if (streams && at.columns == kPair) {
        stream(reinterpret_cast<float*>(out), (Vec)words[r]);
      } else if (at.columns == kPair) {
        *reinterpret_cast<Line32Unaligned*>(out) = words[r];
      } else {
        __builtin_memcpy(out, &words[r], static_cast<size_t>(at.columns) * 2);
      }
    }
  }
}

// Passes that a product of this many rows takes, at least one.
GPTCORE_INLINE int64_t passes_of(const GroupProduct& p, int64_t rows) {
  const int64_t steps = ceil_div(p.k, kPair);
  const int64_t most = smaller(p.b_depth_lines ? kAlongSteps : kAcrossSteps,
                               kPackedRowsBytes / (ceil_div(rows, kPair) * kPairBytes));
  return steps <= most ? 1 : ceil_div(steps, most);
}

// kTransposed: the rows are the B operand, the weight's the A operand.
template <bool kTransposed>
struct BlockProduct {
  static constexpr Role kRows = kTransposed ? Role::b : Role::a;
  static constexpr Role kColumns = kTransposed ? Role::a : Role::b;

  const GroupProduct& p;
  const GroupBlock& block;
  const Operand rows, columns;
  const int64_t steps, pairs, pass_steps;
  const bool streams;
  const bool in_place;  // the weight is not packed

  BlockProduct(const GroupProduct& product, const GroupBlock& at)
      : p(product),
        block(at),
        rows{static_cast<const char*>(product.a), product.a_stride * 2, product.a_depth_lines},
        columns{static_cast<const char*>(product.b), product.b_stride * 2, product.b_depth_lines},
        steps(ceil_div(product.k, kPair)),
        pairs(ceil_div(at.rows, kPair)),
        pass_steps(ceil_div(steps, passes_of(product, at.rows))),
        streams(whole_lines(product)),
        in_place(kTransposed && one_pass() && lies_as_tiles(product)) {}

  // Whether pairs of tiles of the weight are whole lines where they lie, and so spread over the sets of L1 that the
  // 8 steps of a strip stay there.
  static bool lies_as_tiles(const GroupProduct& p) {
    const int64_t stride = p.b_stride * 2, apart = stride / kLine;
    return ((reinterpret_cast<uintptr_t>(p.b) | static_cast<uintptr_t>(stride)) & (kLine - 1)) == 0 &&
           p.n % kPair == 0 && p.k % kPair == 0 && apart % 16 != 0;
  }

  bool one_pass() const { return pass_steps >= steps; }
  int64_t pair_bytes() const { return pass_steps * kPairBytes; }
  int64_t slab_columns() const { return columns.along_depth ? kStripColumns : kAcrossColumns; }
  int64_t strip_floats() const { return pairs * kStripPairs * kPairFloats; }

  // The slab at `column` from step `first` on, if there is one.
  Fetch fetch(int64_t column, int64_t first, int64_t turns) const {
    if (first >= steps) return {};
    return fetch_of(p, column, smaller(slab_columns(), block.column + block.columns - column), first * kPair,
                    smaller(pass_steps * kPair, p.k - first * kPair), turns);
  }

  Tiles packed_tiles(const char* at) const { return {at, kLine, kStepBytes, kPairBytes, pair_bytes()}; }

  Tiles tiles_in_place(int64_t column) const {
    const int64_t stride = columns.stride;
    return {columns.data + column * stride, stride, kGroup * stride, kLine, kPair * stride};
  }

  // The column pair's tiles from step s on.
  void multiply(const char* row_pair, Tiles column_pair, int64_t s, int64_t count, float* c, bool add,
                bool half, Fetch& next) const {
    column_pair.at += s * column_pair.step;
    const Tiles a = kTransposed ? column_pair : packed_tiles(row_pair);
    const char* b = kTransposed ? row_pair : column_pair.at;
    if (half) {
      multiply_pair<!kTransposed, false>(a, b, count, c, add, next);
    } else {
      multiply_pair<!kTransposed, true>(a, b, count, c, add, next);
    }
  }

  void put(const Piece& at, const float* c) const {
    if constexpr (kTransposed) {
      put_transposed(p, at, c, streams);
    } else {
      put_rows(p, at, c, streams);
    }
  }

  // Steps [first, first + count) of a strip, with all rows.
  void strip(int64_t first, int64_t count, int64_t column, int64_t width, const char* packed_rows,
             const Tiles& tiles, float* sums, Fetch& next) const {
    for (int64_t s = 0; s < count; s += kBlockSteps) {
      const int64_t here = smaller(kBlockSteps, count - s);
      for (int64_t g = 0; g < pairs; ++g) {
        const bool half = block.rows - g * kPair <= kGroup;
        for (int64_t q = 0; q * kPair < width; ++q) {
          Tiles pair = tiles;
          pair.at += q * tiles.pair;
          multiply(packed_rows + g * pair_bytes() + s * kPairBytes, pair, s, here,
                   sums + (g * kStripPairs + q) * kPairFloats, first + s > 0, half, next);
        }
      }
    }
    if (first + count < steps) return;
    tile_fence();
    for (int64_t g = 0; g < pairs; ++g) {
      for (int64_t q = 0; q * kPair < width; ++q) {
        put({block.row + g * kPair, smaller(kPair, block.rows - g * kPair), column + q * kPair,
             smaller(kPair, width - q * kPair)},
            sums + (g * kStripPairs + q) * kPairFloats);
      }
    }
    tile_fence();
  }

  void pass(int64_t first, int64_t count, char* packed_rows, char* packed, float* sums) const {
    const int64_t depth = first * kPair, depths = smaller(count * kPair, p.k - depth);
    pack_operand<kRows>(rows, block.row, block.rows, depth, depths, packed_rows, pair_bytes());
    for (int64_t done = 0; done < block.columns; done += slab_columns()) {
      const int64_t column = block.column + done, left = block.columns - done;
      const int64_t width = smaller(slab_columns(), left);
      if (!in_place) pack_operand<kColumns>(columns, column, width, depth, depths, packed, pair_bytes());
      const bool last = left <= slab_columns();
      const int64_t turns = count * pairs * ceil_div(width, kPair);
      Fetch next = fetch(last ? block.column : column + width, last ? first + count : first, turns);
      for (int64_t i = 0; i < width; i += kStripColumns) {
        const Tiles tiles =
            in_place ? tiles_in_place(column + i) : packed_tiles(packed + i / kPair * pair_bytes());
        strip(first, count, column + i, smaller(kStripColumns, width - i), packed_rows, tiles, sums, next);
        if (!one_pass()) sums += strip_floats();
      }
    }
  }

  void run() const {
    const int64_t strips = one_pass() ? 1 : ceil_div(block.columns, kStripColumns);
    const int64_t slab_pairs = ceil_div(smaller(slab_columns(), block.columns), kPair);
    const Scratch packed_rows(static_cast<size_t>(pairs * pair_bytes()));
    const Scratch packed(static_cast<size_t>(slab_pairs * pair_bytes()));
    const Scratch sums(static_cast<size_t>(strips * strip_floats()) * sizeof(float));
    const TileScope scope;
    for (int64_t first = 0; first < steps; first += pass_steps) {
      pass(first, smaller(pass_steps, steps - first), packed_rows.as<char>(), packed.as<char>(),
           sums.as<float>());
    }
    if (steps == 0) put_nothing();
    if (streams) stream_fence();
  }

  // A sum of no products is zero, plus the bias.
  void put_nothing() const {
    alignas(64) const float zeros[kPairFloats] = {};
    for (int64_t i = 0; i < block.rows; i += kPair) {
      for (int64_t j = 0; j < block.columns; j += kPair) {
        put({block.row + i, smaller(kPair, block.rows - i), block.column + j,
             smaller(kPair, block.columns - j)},
            zeros);
      }
    }
  }
};

inline GroupCut blocked_cut(const GroupProduct& p) {
  const bool waiting = passes_of(p, smaller(p.m, kMostRows)) > 1;
  return {kMostRows, waiting ? kWaitingColumns : kOnePassColumns, kStripColumns};
}

void blocked_block(const GroupProduct& p, const GroupBlock& block) {
  if (p.a_depth_lines && p.b_depth_lines) {
    BlockProduct<true>(p, block).run();
  } else {
    BlockProduct<false>(p, block).run();
  }
}

}  // namespace
}  // namespace GPTCORE_ISA_NS
}  // namespace gptcore
