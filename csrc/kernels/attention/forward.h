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

  ForwardTask(const AttentionProblem& p, const Sequence& s, Range blocks)
      : p_(p),
        s_(s),
        dropout_(p, s),
        blocks_(blocks),
        depth_(round_up(p.head_dim, kPer * kLanes) / kPer),
        width_(round_up(p.head_dim, kLanes)),
        keys_(s.keys_of_rows(blocks.begin * kRows, last_row())),
        resident_(blocks.end - blocks.begin > 1),
        key_units_(kKeys * depth_),
        value_units_(kKeys / kPer * width_),
        scratch_(bytes()) {
    first_block_ = keys_.begin / kKeys;
    packed_ = scratch_.template as<Unit>();
    queries_ = packed_ + packed_blocks() * (key_units_ + value_units_);
    scores_ = reinterpret_cast<float*>(queries_ + kRows * depth_);
    sums_ = scores_ + kRows * kScoreRow;
  }

  void run() {
    if (resident_) {
      for (int64_t block = 0; block < packed_blocks(); ++block) pack_keys(first_block_ + block);
    }
    for (int64_t block = blocks_.begin; block < blocks_.end; ++block) row_block(block * kRows);
  }

 private:
  int64_t last_row() const { return at_most(blocks_.end * kRows, s_.rows()); }

  int64_t packed_blocks() const {
    if (keys_.empty()) return 0;
    return resident_ ? (keys_.end + kKeys - 1) / kKeys - keys_.begin / kKeys : 1;
  }

  size_t bytes() const {
    const int64_t units =
        packed_blocks() * (key_units_ + value_units_) + kRows * (depth_ + kScoreRow + width_);
    return static_cast<size_t>(units) * sizeof(Unit);
  }

  Unit* packed_keys(int64_t block) const {
    return packed_ + (resident_ ? block - first_block_ : 0) * (key_units_ + value_units_);
  }

  void pack_keys(int64_t block) {
    const int64_t first = block * kKeys, count = at_most(s_.keys - first, kKeys);
    const int64_t padded = round_up(count, Engine::kKeyStep);
    Unit* out = packed_keys(block);
    pack_columns<Units, T>(KeyRows<const T>(p_.k, s_), first, count, padded, p_.head_dim, depth_, out);
    pack_pairs<Units, T>(KeyRows<const T>(p_.v, s_), first, count, padded / kPer, kKeys / kPer * kLanes,
                         p_.head_dim, out + key_units_);
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
      for (int64_t block = keys.begin / kKeys; block * kKeys < keys.end; ++block) {
        if (!resident_) pack_keys(block);
        const int64_t base = block * kKeys;
        const Range width{round_down(at_least(keys.begin - base, 0), Engine::kKeyStep),
                          round_up(at_most(keys.end - base, kKeys), Engine::kKeyStep)};
        key_block(first, count, base, width, scale, any);
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

  void key_block(int64_t first, int64_t count, int64_t base, Range width, float scale, bool any) {
    const int64_t padded = round_up(count, Engine::kRowStep);
    const Unit* keys = packed_keys(base / kKeys);
    Engine::product(queries_, depth_, {keys + width.begin * depth_, kLanes, kLanes * depth_},
                    scores_ + width.begin, kScoreRow, padded, width.end - width.begin, depth_, false);
    for (int64_t r = 0; r < count; ++r) {
      const Range visible{at_least(seen_[r].begin - base, width.begin),
                          at_most(seen_[r].end - base, width.end)};
      if (p_.modified) modify_row<Engine::kFine>(p_, s_, first + r, base, scores_ + r * kScoreRow, visible);
      softmax_row<Engine>(state_, r, scores_ + r * kScoreRow, visible, width, scale, sums_ + r * width_,
                          any ? width_ : 0);
    }
    if (dropout_.active()) drop(first, count, base, width);
    const Unit* values = keys + key_units_ + width.begin / kPer * kLanes;
    Engine::product(reinterpret_cast<const Unit*>(scores_) + width.begin / kPer, kScoreRow,
                    {values, kLanes, kKeys / kPer * kLanes}, sums_, width_, padded, width_,
                    (width.end - width.begin) / kPer, any);
  }

  // Rows two by two: what both see is nearly the same.
  void drop(int64_t first, int64_t count, int64_t base, Range width) {
    for (int64_t r = 0; r < count; r += 2) {
      const int64_t next = at_most(r + 1, count - 1);
      const Range keys{base + at_least(round_down(seen_[r].begin - base, Engine::kKeyStep), width.begin),
                       base + at_most(round_up(seen_[next].end - base, Engine::kKeyStep), width.end)};
      if (keys.empty()) continue;
      dropout_.drop(first + r, first + next, keys, base, reinterpret_cast<Score*>(scores_ + r * kScoreRow),
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
  const Range blocks_;
  const int64_t depth_, width_;  // head size in units, and in values, padded
  const Range keys_;
  const bool resident_;  // all key blocks stay packed; else one at a time
  const int64_t key_units_, value_units_;
  Scratch scratch_;
  int64_t first_block_;
  Unit *packed_, *queries_;
  float *scores_, *sums_;
  Range seen_[kRows];
  RowStates<kRows> state_;
};

template <class Engine, class T>
void forward(const AttentionProblem& p) {
  const int64_t units = p.batch * p.kv_heads;
  if (p.queries * (p.heads / p.kv_heads) <= DecodeTask<T>::kMaxRows && p.keep == kKeepAll) {
    decode<T>(p);
    return;
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
    const FlushDenormals flush(p.modified);
    ForwardTask<Engine, T>(p, s, mine).run();
  });
}

}  // namespace
}  // namespace GPTCORE_ISA_NS
}  // namespace gptcore
