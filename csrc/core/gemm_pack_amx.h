// Packing for AMX products of blocks: everything is made of blocks of 32 lines x 64 bytes of the matrix,
// each of which becomes 2 KiB: the two tiles (of A: rows 0-15 and 16-31; of B: columns 0-15 and 16-31) that
// 32 x 32 of C need for a step, 32 of depth. A whole cache line of the matrix is read at a time, whatever the
// layout.
#pragma once

#include "core/amx.h"
#include "core/gemm_tile.h"

namespace gptcore {
namespace GPTCORE_ISA_NS {
namespace {

constexpr int64_t kPair = 32;         // rows or columns of a pair of tiles, and depth of a step
constexpr int64_t kPairBytes = 2048;  // a pair's share of a step

// A bf16 matrix as lines of contiguous elements; along_depth: a line runs along the depth of the product.
struct Operand {
  const char* data;
  int64_t stride;  // bytes between lines
  bool along_depth;
};

enum class Role { a, b };

// One block to out. The four cases:
//   A, along the depth: rows as they are.        B, across: depth pairs (2i, 2i + 1) interleaved.
//   B, along the depth: 16 x 16 words transposed. A, across: interleaved, then transposed.
template <Role role, bool along_depth>
GPTCORE_INLINE void pack_lines(const char* in, int64_t stride, char* out) {
  Line32* tiles = reinterpret_cast<Line32*>(out);
  if constexpr (along_depth) {
    for (int half = 0; half < 2; ++half, tiles += 16, in += 16 * stride) {
      Line32 t[16];
#pragma GCC unroll 16
      for (int i = 0; i < 16; ++i) t[i] = *reinterpret_cast<const Line32Unaligned*>(in + i * stride);
      if constexpr (role == Role::b) transpose_words(t);
#pragma GCC unroll 16
      for (int i = 0; i < 16; ++i) tiles[i] = t[i];
    }
  } else {
    for (int half = 0; half < 2; ++half, tiles += 16, in += 32) {
      Line32 t[16];
#pragma GCC unroll 16
      for (int i = 0; i < 16; ++i) {
        const char* low = in + 2 * i * stride;
        if (half == 0) {  // the next block's lines
          __builtin_prefetch(low + kPair * stride, 0, 2);
          __builtin_prefetch(low + (kPair + 1) * stride, 0, 2);
        }
        t[i] = interleave(*reinterpret_cast<const Half16Unaligned*>(low),
                          *reinterpret_cast<const Half16Unaligned*>(low + stride));
      }
      if constexpr (role == Role::a) transpose_words(t);
#pragma GCC unroll 16
      for (int i = 0; i < 16; ++i) tiles[i] = t[i];
    }
  }
}

// Packs lines [line, line + lines) x elements [column, column + width), padded with zeros to whole blocks, to
// out[pair][step]; pair_bytes between pairs. Lines are walked along, 32 together.
template <Role role, bool along_depth>
static void pack_region(const Operand& m, int64_t line, int64_t lines, int64_t column, int64_t width,
                        char* out, int64_t pair_bytes) {
  alignas(64) char edge[kPairBytes];
  const int64_t down = along_depth ? pair_bytes : kPairBytes, across = along_depth ? kPairBytes : pair_bytes;
  for (int64_t i = 0; i * kPair < lines; ++i) {
    const char* in = m.data + (line + i * kPair) * m.stride + column * 2;
    const int64_t count = smaller(kPair, lines - i * kPair);
    for (int64_t j = 0; j * kPair < width; ++j) {
      char* block = out + i * down + j * across;
      const int64_t here = smaller(kPair, width - j * kPair);
      if (count == kPair && here == kPair) {
        pack_lines<role, along_depth>(in + j * kLine, m.stride, block);
        continue;
      }
      __builtin_memset(edge, 0, sizeof(edge));
      for (int64_t r = 0; r < count; ++r) {
        __builtin_memcpy(edge + r * kLine, in + r * m.stride + j * kLine, static_cast<size_t>(here) * 2);
      }
      pack_lines<role, along_depth>(edge, kLine, block);
    }
  }
}

// Rows (of B: columns) [row, row + rows) by depth [depth, depth + depths).
template <Role role>
static void pack_operand(const Operand& m, int64_t row, int64_t rows, int64_t depth, int64_t depths,
                         char* out, int64_t pair_bytes) {
  if (m.along_depth) {
    pack_region<role, true>(m, row, rows, depth, depths, out, pair_bytes);
  } else {
    pack_region<role, false>(m, depth, depths, row, rows, out, pair_bytes);
  }
}

}  // namespace
}  // namespace GPTCORE_ISA_NS
}  // namespace gptcore
