// Forward pass. A task is one sequence, one key head and some blocks of query rows; it packs the keys and
// values it needs once (block by block where only one block of rows reads them), then walks the visible key
// blocks of each row block with the online softmax. A row's bits depend on its own keys only, so the split
// into tasks may follow the thread count.
#pragma once

#include "core/arena.h"
#include "core/parallel.h"
#include "kernels/attention/decode.h"
#include "kernels/attention/dropout.h"
#include "kernels/attention/pack.h"
#include "kernels/attention/pattern.h"
#include "kernels/attention/scores.h"
#include "kernels/attention/softmax.h"

namespace gptcore {
namespace GPTCORE_ISA_NS {
namespace {

template <class Engine, class T>
class ForwardTask {
 public:
  using Units = typename Engine::Units;
  using Unit = typename Units::Unit;
  using Score = typename Engine::Score;
  static constexpr int kRows = Engine::kForwardRows;
  static constexpr int kKeys = Engine::kForwardKeys;
  static constexpr int kScoreRow =
      kKeys + 16;  // not a power of two, so that rows fall into different cache sets
  static constexpr int kPer = Units::kPerUnit;
  // Blocks begin at multiples of it: what dropout draws at a time for a vector of words, and steps of keys.
  static constexpr int kAlign = 32;

  ForwardTask(const AttentionProblem& p, const Sequence& s, Range blocks)
      : p_(p),
        s_(s),
        dropout_(p, s),
        pattern_(p, s),
        blocks_(blocks),
        depth_(round_up(p.head_dim, kPer * kLanes) / kPer),
        width_(round_up(p.head_dim, kLanes)),
        keys_(s.keys_of_rows(blocks.begin * kRows, last_row())),
        resident_(blocks.end - blocks.begin > 1),
        origin_(round_down(keys_.begin, kAlign)),
        room_(keys_.empty() ? 0
              : resident_   ? round_up(keys_.end - origin_, kAlign)
                            : kKeys),
        scratch_(bytes()) {
    packed_keys_ = scratch_.template as<Unit>();
    packed_values_ = packed_keys_ + room_ * depth_;
    queries_ = packed_values_ + room_ / kPer * width_;
    scores_ = reinterpret_cast<float*>(queries_ + kRows * depth_);
    sums_ = scores_ + kRows * kScoreRow;
  }

  void run() {
    if (resident_) pack_keys(origin_, keys_.end - origin_);
    for (int64_t block = blocks_.begin; block < blocks_.end; ++block) row_block(block * kRows);
  }

 private:
  int64_t last_row() const { return at_most(blocks_.end * kRows, s_.rows()); }

  size_t bytes() const {
    const int64_t units = room_ * depth_ + room_ / kPer * width_ + kRows * (depth_ + kScoreRow + width_);
    return static_cast<size_t>(units) * sizeof(Unit);
  }

  // From key `first` on, which becomes the origin; none where the task sees none.
  void pack_keys(int64_t first, int64_t count) {
    if (keys_.empty()) return;
    origin_ = first;
    const int64_t padded = round_up(count, Engine::kKeyStep);
    p_.pages.table ? pack_rows_of<PagedRows>(first, count, padded)
                   : pack_rows_of<KeyRows>(first, count, padded);
  }

  template <template <class> class Rows>
  void pack_rows_of(int64_t first, int64_t count, int64_t padded) {
    pack_columns<Units, T>(Rows<const T>(p_.k, s_), first, count, padded, p_.head_dim, depth_, packed_keys_);
    pack_pairs<Units, T>(Rows<const T>(p_.v, s_), first, count, padded / kPer, room_ / kPer * kLanes,
                         p_.head_dim, packed_values_);
  }

  void row_block(int64_t first) {
    const int64_t count = at_most(s_.rows() - first, kRows), padded = round_up(count, Engine::kRowStep);
    prefetch(first, count);
    state_.reset(count);
    if (p_.sinks) add_sinks(p_, s_, first, count, &state_);
    for (int64_t r = 0; r < count; ++r) seen_[r] = s_.keys_of(first + r);
    bool any = false;
    const Range keys = s_.keys_of_rows(first, first + count);
    if (!keys.empty()) {
      // With a negative scale the largest product is the smallest score: the sign goes into the queries.
      pack_rows<Units, T>(QueryRows<const T>(p_.q, s_), first, count, padded, p_.head_dim, depth_,
                          p_.scale < 0, queries_);
      const float scale = p_.modified ? 1 : (p_.scale < 0 ? -p_.scale : p_.scale) * kLog2e;
      // Blocks begin at the first key that the rows see: a window then meets as few as can be.
      for (int64_t base = round_down(keys.begin, kAlign); base < keys.end; base += kKeys) {
        const int64_t width = at_most(keys.end - base, kKeys);
        const Range columns = find_runs(first, count, base, round_up(width, Engine::kKeyStep));
        if (columns.empty()) continue;
        if (!resident_) pack_keys(base, width);
        key_block(first, count, base, columns, scale, any);
        any = true;
      }
    }
    write(first, count);
  }

  // What a block writes at its end, and the queries of the next: from memory while the block computes.
  void prefetch(int64_t first, int64_t count) const {
    const QueryRows<const T> q(p_.q, s_), out(p_.out, s_);
    constexpr int64_t kLine = 64 / static_cast<int64_t>(sizeof(T));
    for (int64_t r = first; r < first + count; ++r) {
      const T* row = out(r);
      for (int64_t d = 0; d < p_.head_dim; d += kLine) __builtin_prefetch(row + d, 1);
      if (r + kRows < last_row()) prefetch_row(q(r + kRows), p_.head_dim);
    }
  }

  // Keys [key, key + count) of a block, which stand in the columns from `column` on.
  struct Run {
    int64_t key, column, count;
  };

  // Splits the first `width` keys of a block into runs that some row sees, and returns their columns. Without a
  // pattern one run stands in its own place; with one, runs close up.
  Range find_runs(int64_t first, int64_t count, int64_t base, int64_t width) {
    if (!pattern_.active()) {
      run_count_ = 1, runs_[0] = {0, 0, width};
      return {0, width};
    }
    Range columns{0, 0};
    run_count_ = 0;
    for (int64_t key = 0; key < width; key += kPatternStep) {
      if (!pattern_.any(first, first + count, base + key, base + key + kPatternStep)) continue;
      const int64_t keys = at_most(width - key, kPatternStep);
      if (run_count_ > 0 && runs_[run_count_ - 1].key + runs_[run_count_ - 1].count == key) {
        runs_[run_count_ - 1].count += keys;
      } else {
        runs_[run_count_++] = {key, columns.end, keys};
      }
      columns.end += keys;
    }
    return columns;
  }

  void key_block(int64_t first, int64_t count, int64_t base, Range columns, float scale, bool any) {
    const int64_t padded = round_up(count, Engine::kRowStep);
    const Unit* keys = packed_keys_ + (base - origin_) * depth_;
    const Unit* values = packed_values_ + (base - origin_) / kPer * kLanes;
    for (int i = 0; i < run_count_; ++i) {
      Engine::product(queries_, depth_, {keys + runs_[i].key * depth_, kLanes, kLanes * depth_},
                      scores_ + runs_[i].column, kScoreRow, padded, runs_[i].count, depth_, false);
    }
    for (int64_t r = 0; r < count; ++r) {
      float* row = scores_ + r * kScoreRow;
      Range visible{at_least(seen_[r].begin - base, columns.begin),
                    at_most(seen_[r].end - base, columns.end)};
      if (pattern_.active()) {
        visible = hide(r, first + r, base, scale);
      } else if (p_.modified) {
        modify_row<Engine::kFine>(p_, s_, first + r, base, row, visible);
      }
      softmax_row<Engine>(state_, r, row, visible, columns, pattern_.active() ? 1 : scale, sums_ + r * width_,
                          any ? width_ : 0);
      if (dropout_.active() && (r % 2 == 1 || r + 1 == count)) drop(first, round_down(r, 2), r, base);
    }
    for (int i = 0; i < run_count_; ++i) {
      Engine::product(reinterpret_cast<const Unit*>(scores_) + runs_[i].column / kPer, kScoreRow,
                      {values + runs_[i].key / kPer * kLanes, kLanes, room_ / kPer * kLanes}, sums_, width_,
                      padded, width_, runs_[i].count / kPer, any || i > 0);
    }
  }

  // Finishes the scores of a row under a pattern, scale included; the columns from its first visible key to its last.
  Range hide(int64_t r, int64_t row, int64_t base, float scale) {
    float* scores = scores_ + r * kScoreRow;
    Range hull{kKeys, 0};
    for (int i = 0; i < run_count_; ++i) {
      const Run& run = runs_[i];
      const int64_t shift = base + run.key - run.column;
      const Range visible{at_least(seen_[r].begin - shift, run.column),
                          at_most(seen_[r].end - shift, run.column + run.count)};
      if (p_.modified) modify_row<Engine::kFine>(p_, s_, row, shift, scores, visible);
      const Range seen = pattern_.hide(row, base + run.key, run.count, scale, scores + run.column);
      if (!seen.empty()) hull = {at_most(hull.begin, run.column + seen.begin), run.column + seen.end};
    }
    return hull;
  }

  // Two rows while their probabilities are in the first-level cache; what both see is nearly the same.
  void drop(int64_t first, int64_t r, int64_t next, int64_t base) {
    for (int i = 0; i < run_count_; ++i) {
      const int64_t begin = base + runs_[i].key, shift = begin - runs_[i].column;
      const Range keys{at_least(round_down(seen_[r].begin, Engine::kKeyStep), begin),
                       at_most(round_up(seen_[next].end, Engine::kKeyStep), begin + runs_[i].count)};
      if (keys.empty()) continue;
      dropout_.drop(first + r, first + next, keys, shift, reinterpret_cast<Score*>(scores_ + r * kScoreRow),
                    reinterpret_cast<Score*>(scores_ + next * kScoreRow));
    }
  }

  void write(int64_t first, int64_t count) {
    const QueryRows<T> out(p_.out, s_);
    const LseRows<float> lse(p_.lse, p_, s_);
    state_.finish(count);
    for (int64_t r = 0; r < count; ++r) {
      const float factor = state_.raw_max[r] * p_.keep_scale;
      T* row = out(first + r);
      const float* o = sums_ + r * width_;
      if (factor == 0 || seen_[r].empty()) {  // what lies in `o` may come from nowhere
        for_lanes(p_.head_dim, [&](int64_t d, int64_t n) { store_some(row + d, Vec{}, n); });
      } else {
        for_lanes(p_.head_dim, [&](int64_t d, int64_t n) { store_some(row + d, load(o + d) * factor, n); });
      }
      if (p_.lse) lse(first + r) = state_.shift[r];
    }
  }

  const AttentionProblem& p_;
  const Sequence& s_;
  const KeyDropout dropout_;
  const Pattern pattern_;
  const Range blocks_;
  const int64_t depth_, width_;  // head size in units, and in values, padded
  const Range keys_;
  const bool resident_;  // all keys stay packed; else a block at a time
  int64_t origin_;       // the first packed key
  const int64_t room_;   // for so many keys
  Scratch scratch_;
  Unit *packed_keys_, *packed_values_, *queries_;
  float *scores_, *sums_;
  Range seen_[kRows];
  Run runs_[kKeys / kPatternStep / 2 + 1];
  int run_count_;
  RowStates<kRows> state_;
};

template <class Engine, class T, template <class> class Rows>
void decode_by(const AttentionProblem& p) {
  if constexpr (requires { typename Engine::template Decode<Rows>; }) {
    using Task = typename Engine::template Decode<Rows>;
    if (Task::serves(p)) return decode<Task>(p);
  }
  decode<DecodeTask<T, Rows>>(p);
}

template <class Engine, class T>
void forward(const AttentionProblem& p) {
  const int64_t units = p.batch * p.kv_heads;
  if (p.queries * (p.heads / p.kv_heads) <= kDecodeRows && p.keep == kKeepAll && p.stride == 0) {
    return p.pages.table ? decode_by<Engine, T, PagedRows>(p) : decode_by<Engine, T, KeyRows>(p);
  }
  const int64_t row_blocks =
      (p.queries * (p.heads / p.kv_heads) + Engine::kForwardRows - 1) / Engine::kForwardRows;
  if (units == 0 || row_blocks == 0) return;
  // Four tasks a thread even out the work; more would only pack keys more often.
  const int threads = num_threads();
  const int64_t parts = threads == 1 ? 1 : at_most((4 * threads + units - 1) / units, row_blocks);
  parallel_for(units * parts, [&](int64_t task, int) {
    const int64_t part = parts - 1 - task / units, unit = task % units;  // causal: the longest first
    const Sequence s = sequence_of(p, unit / p.kv_heads, unit % p.kv_heads);
    const int64_t blocks = (s.rows() + Engine::kForwardRows - 1) / Engine::kForwardRows;
    const Range mine{blocks * part / parts, blocks * (part + 1) / parts};
    if (mine.empty()) return;
    [[maybe_unused]] const typename Engine::Scope scope;
    const FlushDenormals flush(p.modified || p.stride != 0);
    ForwardTask<Engine, T>(p, s, mine).run();
  });
}

}  // namespace
}  // namespace GPTCORE_ISA_NS
}  // namespace gptcore
