// AMX tiles for bf16 products: 8 tiles of up to 16 rows x 64 bytes. TDPBF16PS adds to a 16 x 16 f32 tile C
//   C[m][n] += sum_k A[m][2k] * B[k][2n] + A[m][2k+1] * B[k][2n+1]      (k < 16)
// A holds 16 rows of 32 consecutive bf16 values; B holds 16 rows of 16 pairs, pair (2k, 2k+1) of each column
// side by side. One such instruction takes 16 cycles, 16384 flops: 1024 flops a cycle and core; four
// accumulators hide its latency of about 52 cycles. Only *_amx.cpp files may include this.
#pragma once

#include <immintrin.h>

#include <cstdint>

#include "core/simd.h"

namespace gptcore {
namespace GPTCORE_ISA_NS {

constexpr int kTileRows = 16;
constexpr int kTileCols = 16;   // f32 columns of C, or pairs of B
constexpr int kTileDepth = 32;  // bf16 values of a row of A
constexpr int kTileBytes = 1024;

struct alignas(64) TileConfig {
  uint8_t palette = 1;
  uint8_t start_row = 0;
  uint8_t reserved[14] = {};
  uint16_t row_bytes[16] = {};
  uint8_t rows[16] = {};
};
static_assert(sizeof(TileConfig) == 64);

// gcc's tile loads and LDTILECFG are asm statements that do not say what memory they read: without this
// barrier the stores before them may be moved behind them or dropped. Put one between writing operands and
// loading them.
GPTCORE_INLINE void tile_fence() { __asm__ volatile("" ::: "memory"); }

// All eight tiles at full size, or the first seven with so many rows. Every task that uses tiles starts with this:
// other libraries in the process (oneDNN) leave their own configuration behind on the same threads.
GPTCORE_INLINE void configure_tiles(int rows = kTileRows) {
  TileConfig config;
  for (int tile = 0; tile < 8; ++tile) {
    config.row_bytes[tile] = 64;
    config.rows[tile] = static_cast<uint8_t>(tile < 7 ? rows : kTileRows);
  }
  __asm__ volatile(""
                   :
                   : "r"(&config)
                   : "memory");  // see tile_fence; and `config` escapes, so all of it is stored
  _tile_loadconfig(&config);
}

// Gives the state back, so that context switches need not save 8 KB.
GPTCORE_INLINE void release_tiles() { _tile_release(); }

// A frame of tile use within a task.
struct TileScope {
  __attribute__((always_inline)) explicit TileScope(int rows = kTileRows) { configure_tiles(rows); }
  __attribute__((always_inline)) ~TileScope() { release_tiles(); }
};

}  // namespace GPTCORE_ISA_NS
}  // namespace gptcore
