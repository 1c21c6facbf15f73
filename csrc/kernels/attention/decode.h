// Forward pass for one to four rows per key head, as in decoding: each key and value is used so rarely that
// packing it would cost more than the arithmetic. Keys are read where they lie, kLanes dot products at a
// time; a transpose turns their partial sums into one vector of scores. Everything is f32.
//
// The heads of a token lie side by side, so a task walks the key blocks for all its heads together: what the
// hardware prefetches beyond one head's row is the next head's.
#pragma once

#include "core/arena.h"
#include "core/parallel.h"
#include "kernels/attention/scores.h"
#include "kernels/attention/softmax.h"

namespace gptcore {
namespace GPTCORE_ISA_NS {
namespace {

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

template <class T>
class DecodeTask {
 public:
  // Nothing to set up on a thread.
  struct Scope {
    explicit Scope(int64_t) {}
  };
  static constexpr int kMaxRows = 4;
  static constexpr int kKeys =
      64;  // keys and values of a block stay in cache for all rows and neighbouring heads
  static constexpr int kMaxWidth = 256;

  // Lives in scratch memory, so set up by a call.
  void begin(const AttentionProblem& p, const Sequence& s) {
    p_ = p, s_ = s, k_ = KeyRows<const T>(p.k, s), v_ = KeyRows<const T>(p.v, s);
    const int64_t rows = s_.rows();
    const QueryRows<const T> q(p_.q, s_);
    for (int64_t r = 0; r < rows; ++r) {
      const T* row = q(r);
      const float sign = p_.scale < 0 ? -1.0f : 1.0f;
      for_lanes(p_.head_dim, [&](int64_t d, int64_t n) {
        store(query_[r] + d, load_some(row + d, n) * sign);
        store(sum_[r] + d, Vec{});
      });
    }
    state_.reset(rows);
    if (p_.sinks) add_sinks(p_, s_, 0, rows, &state_);
  }

  void keys(int64_t base, int64_t count) {
    for (int64_t r = 0; r < s_.rows(); ++r) block(r, base, count, r == 0);
  }

  void write() { write_rows<T>(p_, s_, &state_, sum_); }

 private:
  void block(int64_t r, int64_t base, int64_t count, bool cold) {
    const Range seen = s_.keys_of(r);
    const Range visible{at_least(seen.begin - base, 0), at_most(seen.end - base, count)};
    if (visible.empty()) return;
    for (int64_t key = 0; key < count; key += kLanes)
      scores(r, base + key, at_most(count - key, kLanes), key, cold);
    const Range width{0, round_up(count, kLanes)};
    const float scale = p_.modified ? 1 : (p_.scale < 0 ? -p_.scale : p_.scale) * kLog2e;
    if (p_.modified) modify_row<DecodeEngine::kFine>(p_, s_, r, base, scores_, visible);
    softmax_row<DecodeEngine>(state_, r, scores_, visible, width, scale, sum_[r],
                              round_up(p_.head_dim, kLanes));
    for (int64_t d = 0; d < p_.head_dim; d += 4 * kLanes) values(r, base, visible, d, cold && d == 0);
  }

  // Scores of keys [first, first + n) into scores_[at...]; keys beyond n repeat the last.
  void scores(int64_t r, int64_t first, int64_t n, int64_t at, bool cold) {
    Vec part[kLanes];
#pragma GCC unroll 16
    for (int i = 0; i < kLanes; ++i) {
      const T* key = k_(first + at_most(i, n - 1));
      if (cold && first + i + kLanes < s_.keys) prefetch_row(k_(first + i + kLanes), p_.head_dim);
      Vec sum = {};
      int64_t d = 0;
      for (; d + kLanes <= p_.head_dim; d += kLanes) sum += load(query_[r] + d) * load(key + d);
      if (d < p_.head_dim) sum += load(query_[r] + d) * load_n(key + d, p_.head_dim - d);
      part[i] = sum;
    }
    transpose(part);
#pragma GCC unroll 4
    for (int width = kLanes / 2; width > 0; width /= 2) {
#pragma GCC unroll 8
      for (int i = 0; i < width; ++i) part[i] += part[i + width];
    }
    store(scores_ + at, part[0]);
  }

  // Adds probabilities times values for depths [d, d + 4 kLanes).
  void values(int64_t r, int64_t base, Range keys, int64_t d, bool cold) {
    const int64_t left = p_.head_dim - d;
    float* sum = sum_[r] + d;
    Vec a = load(sum), b = load(sum + kLanes), c = load(sum + 2 * kLanes), e = load(sum + 3 * kLanes);
    for (int64_t key = keys.begin; key < keys.end; ++key) {
      const T* v = v_(base + key) + d;
      if (cold && base + key + kPrefetchRows < s_.keys)
        prefetch_row(v_(base + key + kPrefetchRows), p_.head_dim);
      const Vec p = splat(scores_[key]);
      if (left >= 4 * kLanes) {
        a += p * load(v), b += p * load(v + kLanes), c += p * load(v + 2 * kLanes),
            e += p * load(v + 3 * kLanes);
      } else {
        a += p * load_n(v, lanes_left(left, 0));
        if (left > kLanes) b += p * load_n(v + kLanes, lanes_left(left, kLanes));
        if (left > 2 * kLanes) c += p * load_n(v + 2 * kLanes, lanes_left(left, 2 * kLanes));
        if (left > 3 * kLanes) e += p * load_n(v + 3 * kLanes, lanes_left(left, 3 * kLanes));
      }
    }
    store(sum, a), store(sum + kLanes, b), store(sum + 2 * kLanes, c), store(sum + 3 * kLanes, e);
  }

  AttentionProblem p_;
  Sequence s_;
  KeyRows<const T> k_, v_;
  alignas(64) float query_[kMaxRows][kMaxWidth];
  alignas(64) float sum_[kMaxRows][kMaxWidth + 4 * kLanes];
  alignas(64) float scores_[kKeys];
  RowStates<kLanes> state_;
};

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
    for (int64_t h = 0; h < heads; ++h) tasks[h].begin(p, sequence_of(p, index, first + h));
    const Sequence s = sequence_of(p, index, first);
    [[maybe_unused]] const typename Task::Scope scope(at_least(s.rows(), 1));
    const Range keys = s.rows() ? s.keys_of_rows(0, s.rows()) : Range{0, 0};
    for (int64_t base = keys.begin; base < keys.end; base += Task::kKeys) {
      const int64_t count = at_most(keys.end - base, Task::kKeys);
      for (int64_t h = 0; h < heads; ++h) tasks[h].keys(base, count);
    }
    for (int64_t h = 0; h < heads; ++h) tasks[h].write();
  });
}

}  // namespace
}  // namespace GPTCORE_ISA_NS
}  // namespace gptcore
