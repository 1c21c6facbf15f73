// decode.h's task for bf16 on AMX tiles, for head sizes of whole tiles. Arithmetic then is so little that memory is
// all that counts: keys are the left operand where they lie, 16 of them by 32 of their depth to a tile, and give
// scores of all rows; values are joined in pairs of keys on their way to tiles. Meanwhile lines of later keys are
// asked for, so that the memory never waits.
#pragma once

#include "core/amx.h"
#include "kernels/attention/decode.h"

namespace gptcore {
namespace GPTCORE_ISA_NS {
namespace {

// Tiles 0-3 hold sums of values and 4 probabilities, as many rows as there are queries; 5 is the right operand,
// 6 keys, 7 their scores.
struct DecodeTiles {
  explicit DecodeTiles(int64_t rows) {
    TileConfig config;
    for (int tile = 0; tile < 8; ++tile) {
      config.row_bytes[tile] = 64;
      config.rows[tile] = tile < 5 ? static_cast<uint8_t>(rows) : kTileRows;
    }
    __asm__ volatile("" : : "r"(&config) : "memory");  // see tile_fence
    _tile_loadconfig(&config);
  }
  ~DecodeTiles() { release_tiles(); }
};

template <class Engine, template <class> class Rows>
class TileDecodeTask {
 public:
  using Scope = DecodeTiles;
  static constexpr int kElementBytes = 2, kMaxRows = kDecodeRows, kKeys = 64, kMaxWidth = 256;
  static constexpr int kScoreKeys = kTileRows, kValueKeys = kTileDepth;

  static bool serves(const AttentionProblem& p) { return p.head_dim % kTileDepth == 0; }

  void begin(const AttentionProblem& p, const Sequence& s, int64_t ahead) {
    p_ = p, s_ = s, ahead_ = ahead, k_ = Rows<const bf16>(p.k, s), v_ = Rows<const bf16>(p.v, s);
    const int64_t rows = s_.rows();
    const QueryRows<const bf16> q(p_.q, s_);
    // No more than this head size reads: with few keys clearing all of it would be half of the work.
    __builtin_memset(query_, 0, static_cast<size_t>(p_.head_dim / kTileDepth) * sizeof(query_[0]));
    const uint16_t sign = p_.scale < 0 ? 0x8000 : 0;
    for (int64_t r = 0; r < rows; ++r) {
      __builtin_memset(sum_[r], 0, static_cast<size_t>(p_.head_dim) * sizeof(float));
      const uint16_t* row = reinterpret_cast<const uint16_t*>(q(r));
      for (int64_t d = 0; d < p_.head_dim; d += 2) {
        const uint32_t low = row[d] ^ sign, high = row[d + 1] ^ sign;
        query_[d / kTileDepth][d % kTileDepth / 2][r] = low | high << 16;
      }
    }
    state_.reset(rows);
    if (p_.sinks) add_sinks(p_, s_, 0, rows, &state_);
  }

  void weigh(int64_t base, int64_t count) {
    const int64_t rows = s_.rows();
    const Range width{0, round_up(count, kTileDepth)};
    const float scale = p_.modified ? 1 : (p_.scale < 0 ? -p_.scale : p_.scale) * kLog2e;
    for (int64_t r = 0; r < rows; ++r) {
      const Range seen = s_.keys_of(r);
      const Range visible{at_least(seen.begin - base, 0), at_most(seen.end - base, count)};
      if (p_.modified && !visible.empty()) {
        modify_row<Engine::kFine>(p_, s_, r, base, scores_[r], visible);
      }
      softmax_row<Engine>(state_, r, scores_[r], visible, width, scale, sum_[r], p_.head_dim);
    }
  }

  // Scores of keys [base + key, base + key + n) with all rows.
  void scores(int64_t base, int64_t key, int64_t n) {
    const int64_t first = base + key, rows = s_.rows();
    alignas(64) bf16 edge[kTileRows * kMaxWidth];
    const bf16* keys = k_(first);
    int64_t bytes = k_.token * 2;
    if (n < kTileRows || !k_.even(first, n)) {
      bytes = p_.head_dim * 2;
      const auto row = static_cast<size_t>(bytes);
      for (int64_t i = 0; i < n; ++i) __builtin_memcpy(edge + i * p_.head_dim, k_(first + i), row);
      __builtin_memset(edge + n * p_.head_dim, 0, static_cast<size_t>(kTileRows - n) * row);
      keys = edge;
    }
    const bf16* later = k_(first + ahead_);
    tile_fence();
    _tile_zero(7);
    for (int64_t d = 0; d < p_.head_dim; d += kTileDepth) {
      _tile_loadd(6, keys + d, bytes);
      _tile_loadd(5, query_[d / kTileDepth], 64);
      _tile_dpbf16ps(7, 6, 5);
      fetch(later + d, k_.token, n);
    }
    alignas(64) float tile[kTileRows][kTileCols];
    _tile_stored(7, tile, 64);
    tile_fence();
    Vec column[kLanes];
#pragma GCC unroll 16
    for (int i = 0; i < kLanes; ++i) column[i] = load(tile[i]);
    transpose(column);
    for (int64_t r = 0; r < rows; ++r) store(scores_[r] + key, column[r]);
  }

  // Adds probabilities times values of keys [base + key, base + key + n).
  void values(int64_t base, int64_t key, int64_t n) {
    alignas(64) uint32_t panel[kMaxWidth / kTileCols][kTileRows][kTileCols];
    const int64_t panels = p_.head_dim / kTileCols;
    for (int64_t i = 0; i < kTileRows; ++i) {
      const int64_t low = 2 * i;
      const bf16 *row = v_(base + key + low), *next = v_(base + key + low + 1);
      const bf16* later = v_(base + key + low + ahead_);
      for (int64_t d = 0; d < panels; ++d) {
        const __m512i a = low < n ? half(row + d * kTileCols) : __m512i{};
        const __m512i b = low + 1 < n ? half(next + d * kTileCols) : __m512i{};
        _mm512_store_si512(panel[d][i], _mm512_or_si512(a, _mm512_slli_epi32(b, 16)));
      }
      for (int64_t d = 0; d < p_.head_dim && low < n; d += kTileDepth) {
        fetch(later + d, v_.token, 2);
      }
    }
    tile_fence();
    const bf16* p = reinterpret_cast<const bf16*>(scores_[0]) + key;
    _tile_loadd(4, p, sizeof(scores_[0]));
    for (int64_t d = 0; d < panels; d += 2) {
      float* sum = sum_[0] + d * kTileCols;
      _tile_loadd(0, sum, sizeof(sum_[0]));
      _tile_loadd(1, sum + kTileCols, sizeof(sum_[0]));
      _tile_loadd(5, panel[d], 64);
      _tile_dpbf16ps(0, 4, 5);
      _tile_loadd(6, panel[d + 1], 64);
      _tile_dpbf16ps(1, 4, 6);
      _tile_stored(0, sum, sizeof(sum_[0]));
      _tile_stored(1, sum + kTileCols, sizeof(sum_[0]));
    }
    tile_fence();
  }

  void write() { write_rows<bf16>(p_, s_, &state_, sum_); }

 private:
  // Asks for the lines of later keys at some depth.
  static void fetch(const bf16* rows, int64_t stride, int64_t n) {
    for (int64_t i = 0; i < n; ++i) __builtin_prefetch(rows + i * stride, 0, 2);
  }

  // 16 values of a key as the lower halves of words.
  static __m512i half(const bf16* p) {
    return _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
  }

  AttentionProblem p_;
  Sequence s_;
  Rows<const bf16> k_, v_;
  int64_t ahead_;
  alignas(64) uint32_t query_[kMaxWidth / kTileDepth][kTileRows][kTileCols];
  alignas(64) float sum_[kMaxRows][kMaxWidth];
  alignas(64) float scores_[kMaxRows][kKeys];
  RowStates<kLanes> state_;
};

}  // namespace
}  // namespace GPTCORE_ISA_NS
}  // namespace gptcore
