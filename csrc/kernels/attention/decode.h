// Forward pass for one to four rows per key head, as in decoding: each key and value is used so rarely that
// packing it would cost more than the arithmetic. Keys are read where they lie, kLanes dot products at a
// time; a transpose turns their partial sums into one vector of scores. Everything is f32.
//
// The heads of a token lie side by side, so a task takes a few keys of each of its heads in turn, then as
// many values: memory is read in runs of whole tokens, which the hardware's prefetching can follow. All rows
// of a group meet a key together, since little of a head's block would survive in the first-level cache until
// the next row: keys of one head lie 2 or 4 KB apart, in the same few sets.
#pragma once

#include "core/arena.h"
#include "core/parallel.h"
#include "kernels/attention/scores.h"
#include "kernels/attention/softmax.h"

namespace gptcore {
namespace GPTCORE_ISA_NS {
namespace {

constexpr int kDecodeRows = 4;  // of a key head, at most

struct DecodeEngine {
  using Score = float;
  static constexpr bool kFine = true;
  static __attribute__((always_inline)) inline void store_two(float* p, Vec x, Vec y) {
    store(p, x);
    store(p + kLanes, y);
  }
};

// Sums over the sums of exponentials to the output of the rows, and their lse.
template <class T, int kRows, int kWidth>
void write_rows(const AttentionProblem& p, const Sequence& s, RowStates<kLanes>* state,
                const float (&sums)[kRows][kWidth]) {
  const int64_t rows = s.rows();
  const QueryRows<T> out(p.out, s);
  const LseRows<float> lse(p.lse, p, s);
  state->finish(rows);
  for (int64_t r = 0; r < rows; ++r) {
    T* row = out(r);
    const float factor = state->raw_max[r];
    for_lanes(p.head_dim, [&](int64_t d, int64_t n) {
      store_some(row + d, factor == 0 ? Vec{} : load(sums[r] + d) * factor, n);
    });
    if (p.lse) lse(r) = state->shift[r];
  }
}

// Asks for a row of a later key, for the second-level cache: see above.
template <class T>
GPTCORE_INLINE void fetch_row(const T* row, int64_t size) {
  const char* p = reinterpret_cast<const char*>(row);
  for (int64_t at = 0; at < size * static_cast<int64_t>(sizeof(T)); at += 64)
    __builtin_prefetch(p + at, 0, 2);
}

// Rows: KeyRows or PagedRows.
template <class T, template <class> class Rows>
class DecodeTask {
 public:
  // Nothing to set up on a thread.
  struct Scope {
    explicit Scope(int64_t) {}
  };
  static constexpr int kElementBytes = sizeof(T), kMaxRows = kDecodeRows, kMaxWidth = 256;
  static constexpr int kKeys = 64;                        // keys between two softmaxes
  static constexpr int kScoreKeys = 16, kValueKeys = 16;  // of a head before the next head's

  // Lives in scratch memory, so set up by a call.
  void begin(const AttentionProblem& p, const Sequence& s, int64_t ahead) {
    p_ = p, s_ = s, ahead_ = ahead, k_ = Rows<const T>(p.k, s), v_ = Rows<const T>(p.v, s);
    const int64_t rows = s_.rows();
    const QueryRows<const T> q(p_.q, s_);
    __builtin_memset(query_, 0, sizeof(query_));
    __builtin_memset(sum_, 0, sizeof(sum_));
    __builtin_memset(scores_, 0, sizeof(scores_));
    for (int64_t r = 0; r < rows; ++r) {
      const T* row = q(r);
      const float sign = p_.scale < 0 ? -1.0f : 1.0f;
      for_lanes(p_.head_dim,
                [&](int64_t d, int64_t n) { store(query_[r] + d, load_some(row + d, n) * sign); });
      seen_[r] = s_.keys_of(r);
    }
    state_.reset(rows);
    if (p_.sinks) add_sinks(p_, s_, 0, rows, &state_);
  }

  // Scores of keys [base + key, base + key + n) with all rows.
  void scores(int64_t base, int64_t key, int64_t n) {
    const int64_t rows = s_.rows();
    if (rows == 1) return scores_of<1>(base, key, n);
    rows == 2 ? scores_of<2>(base, key, n) : scores_of<4>(base, key, n);
  }

  // Scores of keys [base, base + count) to probabilities.
  void weigh(int64_t base, int64_t count) {
    const Range width{0, round_up(count, kLanes)};
    const float scale = p_.modified ? 1 : (p_.scale < 0 ? -p_.scale : p_.scale) * kLog2e;
    for (int64_t r = 0; r < s_.rows(); ++r) {
      const Range visible = seen_in(r, base, 0, count);
      if (visible.empty()) continue;
      if (p_.modified) modify_row<DecodeEngine::kFine>(p_, s_, r, base, scores_[r], visible);
      softmax_row<DecodeEngine>(state_, r, scores_[r], visible, width, scale, sum_[r],
                                round_up(p_.head_dim, kLanes));
    }
  }

  // Adds probabilities times values of keys [base + key, base + key + n): those that all rows see for all
  // rows together, those at either end of a window or a causal mask row by row.
  void values(int64_t base, int64_t key, int64_t n) {
    const int64_t rows = s_.rows();
    Range shared{key, key + n};
    for (int64_t r = 0; r < rows; ++r) {
      const Range seen = seen_in(r, base, key, n);
      shared = {at_least(shared.begin, seen.begin), at_most(shared.end, seen.end)};
    }
    if (shared.empty()) shared = {key + n, key + n};
    for (int64_t r = 0; r < rows; ++r) {
      const Range seen = seen_in(r, base, key, n);
      add_values<1>(r, base, {seen.begin, at_most(seen.end, shared.begin)});
    }
    rows == 1   ? add_values<1>(0, base, shared)
    : rows == 2 ? add_values<2>(0, base, shared)
                : add_values<4>(0, base, shared);
    for (int64_t r = 0; r < rows; ++r) {
      const Range seen = seen_in(r, base, key, n);
      add_values<1>(r, base, {at_least(seen.begin, shared.end), seen.end});
    }
  }

  void write() { write_rows<T>(p_, s_, &state_, sum_); }

 private:
  // Where the block at `base` has keys of [key, key + n) that row r sees.
  Range seen_in(int64_t r, int64_t base, int64_t key, int64_t n) const {
    return {at_least(seen_[r].begin - base, key), at_most(seen_[r].end - base, key + n)};
  }

  // kLanes dot products at a time, of some keys with all rows; a transpose makes one vector of their sums.
  // Keys beyond n repeat the last.
  template <int kRows>
  void scores_of(int64_t base, int64_t key, int64_t n) {
    constexpr int kCount = kLanes / kRows;
    for (int64_t first = 0; first < n; first += kCount) {
      const T* keys[kCount];
      for (int i = 0; i < kCount; ++i) {
        keys[i] = k_(base + key + at_most(first + i, n - 1));
        fetch_row(k_(base + key + first + i + ahead_), p_.head_dim);
      }
      Vec part[kLanes] = {};
      for (int64_t d = 0; d < p_.head_dim; d += kLanes) {
        const int64_t lanes = at_most(p_.head_dim - d, kLanes);
        Vec x[kCount];
#pragma GCC unroll 16
        for (int i = 0; i < kCount; ++i) x[i] = load_some(keys[i] + d, lanes);
#pragma GCC unroll 4
        for (int r = 0; r < kRows; ++r) {
          const Vec q = load(query_[r] + d);
#pragma GCC unroll 16
          for (int i = 0; i < kCount; ++i) part[r * kCount + i] += q * x[i];
        }
      }
      transpose(part);
#pragma GCC unroll 4
      for (int width = kLanes / 2; width > 0; width /= 2) {
#pragma GCC unroll 8
        for (int i = 0; i < width; ++i) part[i] += part[i + width];
      }
      for (int r = 0; r < kRows; ++r) {
        __builtin_memcpy(scores_[r] + key + first, reinterpret_cast<const float*>(&part[0]) + r * kCount,
                         kCount * sizeof(float));
      }
    }
  }

  // For rows [row, row + kRows), a part of the depth at a time that leaves room for its sums in registers.
  template <int kRows>
  void add_values(int64_t row, int64_t base, Range keys) {
    if (keys.empty()) return;
    constexpr int kSums = kLanes == 16 ? 16 : 8, kWidth = kSums / kRows > 4 ? 4 : kSums / kRows;
    for (int64_t key = keys.begin; key < keys.end; ++key) {
      fetch_row(v_(base + key + ahead_), p_.head_dim);
    }
    int64_t d = 0;
    for (; d + kWidth * kLanes <= p_.head_dim; d += kWidth * kLanes) {
      add_columns<kRows, kWidth>(row, base, keys, d, kLanes);
    }
    for (; d < p_.head_dim; d += kLanes) {
      add_columns<kRows, 1>(row, base, keys, d, at_most(p_.head_dim - d, kLanes));
    }
  }

  template <int kRows, int kWidth>
  void add_columns(int64_t row, int64_t base, Range keys, int64_t d, int64_t lanes) {
    Vec sum[kRows][kWidth];
#pragma GCC unroll 4
    for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
      for (int w = 0; w < kWidth; ++w) sum[r][w] = load(sum_[row + r] + d + w * kLanes);
    }
    for (int64_t key = keys.begin; key < keys.end; ++key) {
      const T* v = v_(base + key) + d;
      Vec x[kWidth];
#pragma GCC unroll 4
      for (int w = 0; w < kWidth; ++w) x[w] = kWidth > 1 ? load(v + w * kLanes) : load_some(v, lanes);
#pragma GCC unroll 4
      for (int r = 0; r < kRows; ++r) {
        const Vec p = splat(scores_[row + r][key]);
#pragma GCC unroll 4
        for (int w = 0; w < kWidth; ++w) sum[r][w] += p * x[w];
      }
    }
#pragma GCC unroll 4
    for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
      for (int w = 0; w < kWidth; ++w) store(sum_[row + r] + d + w * kLanes, sum[r][w]);
    }
  }

  AttentionProblem p_;
  Sequence s_;
  Rows<const T> k_, v_;
  int64_t ahead_;
  Range seen_[kMaxRows];
  alignas(64) float query_[kMaxRows][kMaxWidth];
  alignas(64) float sum_[kMaxRows][kMaxWidth + 4 * kLanes];
  alignas(64) float scores_[kMaxRows][kKeys];
  RowStates<kLanes> state_;
};

// Keys between the ones at work and those asked for meanwhile: 32 KB of whole tokens. Half as far is no slower
// in f32, twice as far 1.2 times, as are other distances in bf16: see docs/kernels/attention.md.
inline int64_t keys_ahead(int64_t token_bytes) {
  return at_most(at_least(32768 / at_least(token_bytes, 1), 8), 64);
}

// Takes keys [base, base + count) to the sums of some heads.
template <class Task>
void decode_block(Task* tasks, int64_t heads, int64_t base, int64_t count) {
  for (int64_t key = 0; key < count; key += Task::kScoreKeys) {
    const int64_t n = at_most(count - key, Task::kScoreKeys);
    for (int64_t h = 0; h < heads; ++h) tasks[h].scores(base, key, n);
  }
  for (int64_t h = 0; h < heads; ++h) tasks[h].weigh(base, count);
  for (int64_t key = 0; key < count; key += Task::kValueKeys) {
    const int64_t n = at_most(count - key, Task::kValueKeys);
    for (int64_t h = 0; h < heads; ++h) tasks[h].values(base, key, n);
  }
}

template <class Task>
void decode(const AttentionProblem& p) {
  // Two tasks a thread; a row's bits do not depend on the split.
  const int64_t wanted = 2 * num_threads();
  const int64_t parts = at_most((wanted + p.batch - 1) / at_least(p.batch, 1), p.kv_heads);
  parallel_for(p.batch * parts, [&](int64_t task, int) {
    const int64_t index = task / parts, part = task % parts;
    const int64_t first = p.kv_heads * part / parts, heads = p.kv_heads * (part + 1) / parts - first;
    const FlushDenormals flush(p.modified);
    const Scratch scratch(static_cast<size_t>(heads) * sizeof(Task));
    Task* tasks = scratch.as<Task>();
    // Rows of two heads of a token make no run: one head after the other then keeps more of it in cache.
    const int64_t together = heads > 2 ? heads : 1;
    // Keys that are asked for together should share a page.
    const int64_t near = keys_ahead(heads * p.head_dim * Task::kElementBytes);
    const int64_t ahead = p.pages.table ? round_up(near, Task::kScoreKeys) : near;
    for (int64_t h = 0; h < heads; ++h) tasks[h].begin(p, sequence_of(p, index, first + h), ahead);
    const Sequence s = sequence_of(p, index, first);
    [[maybe_unused]] const typename Task::Scope scope(at_least(s.rows(), 1));
    const Range keys = s.rows() ? s.keys_of_rows(0, s.rows()) : Range{0, 0};
    for (int64_t base = keys.begin; base < keys.end; base += Task::kKeys) {
      const int64_t count = at_most(keys.end - base, Task::kKeys);
      for (int64_t h = 0; h < heads; h += together) {
        decode_block(tasks + h, at_most(heads - h, together), base, count);
      }
    }
    for (int64_t h = 0; h < heads; ++h) tasks[h].write();
  });
}

}  // namespace
}  // namespace GPTCORE_ISA_NS
}  // namespace gptcore
