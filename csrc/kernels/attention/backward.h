// Backward pass. A task is one sequence, one key head and a run of key blocks. Scores are computed transposed
// (keys by rows), so that row constants are vectors and every product finds its operand as it falls:
//
//   S' = K Q'   P' = exp2(S' c - lse)   dP' = V dO'   dS' = P' (dP' - delta)     by strips of kStrip keys
//   dV += P' dO   dK += dS' Q                                                    per strip
//   dQ' += K' dS'                                                                per key block and row block
//
// Query-side operands are packed once per task; dK and dV sum over row blocks in order, dQ over key blocks in
// order. Few heads are split by key blocks, by the shape alone, each part with its own dQ, added in order.
#pragma once

#include "core/arena.h"
#include "core/parallel.h"
#include "kernels/attention/dropout.h"
#include "kernels/attention/pack.h"
#include "kernels/attention/pattern.h"
#include "kernels/attention/scores.h"
#include "kernels/attention/softmax.h"

namespace gptcore {
namespace GPTCORE_ISA_NS {
namespace {

// Takes 64-byte aligned pieces off a block of scratch; with a null base, adds up how much is needed.
class Carver {
 public:
  explicit Carver(void* base) : base_(static_cast<char*>(base)) {}

  template <class T>
  T* take(int64_t count) {
    T* piece = base_ ? reinterpret_cast<T*>(base_ + used_) : nullptr;
    used_ += (static_cast<size_t>(count) * sizeof(T) + 63) / 64 * 64;
    return piece;
  }
  size_t used() const { return used_; }

 private:
  char* base_;
  size_t used_ = 0;
};

// Writes rows [first, first + count) of a (depth, row) block of sums, transposed and scaled.
template <class T, class Rows>
void write_transposed(const float* sums, int64_t sums_row, int64_t count, int64_t size, float scale,
                      const Rows& rows, int64_t first) {
  for (int64_t r = 0; r < count; r += kLanes) {
    for (int64_t d = 0; d < size; d += kLanes) {
      Vec block[kLanes];
#pragma GCC unroll 16
      for (int i = 0; i < kLanes; ++i) block[i] = load(sums + (d + i) * sums_row + r) * scale;
      transpose(block);
      const int64_t n = at_most(size - d, kLanes), last = at_most(count - r, kLanes);
      for (int64_t i = 0; i < last; ++i) store_some(rows(first + r + i) + d, block[i], n);
    }
  }
}

template <class Engine, class T>
class BackwardTask {
 public:
  using Units = typename Engine::Units;
  using Unit = typename Units::Unit;
  using Score = typename Engine::Score;
  static constexpr int kRows = Engine::kBackwardRows;
  static constexpr int kKeys = Engine::kBackwardKeys;
  static constexpr int kStrip = Engine::kStrip;
  static constexpr int kPer = Units::kPerUnit;
  static constexpr int kScoreRow = kRows + 16;
  static constexpr int kKeyRow = kKeys / kPer + 16;
  static constexpr bool kPaired = kPer == 2;
  static_assert(kRows % kStrip == 0 && kKeys % kStrip == 0);

  // dq: sums of this task, (row blocks, width, kRows). sinks: the gradients of this sequence's and heads' sinks,
  // or null.
  BackwardTask(const AttentionProblem& p, const Sequence& s, float* dq, double* sinks)
      : p_(p),
        s_(s),
        row_blocks_((s.rows() + kRows - 1) / kRows),
        dropout_(p, s, row_blocks_ * kRows),
        pattern_(p, s),
        depth_(round_up(p.head_dim, kPer * kLanes) / kPer),
        width_(round_up(p.head_dim, kLanes)),
        terms_(p, s),
        dbias_(p.dbias, s),
        scratch_(carve(Carver(nullptr)).used()),
        dq_(dq),
        sinks_(sinks) {
    carve(Carver(scratch_.template as<char>()));
  }

  // Key blocks [blocks.begin, blocks.end).
  void run(Range blocks) {
    prepare_rows();
    if (sinks_) sum_sinks();
    __builtin_memset(dq_, 0, static_cast<size_t>(row_blocks_ * width_ * kRows) * sizeof(float));
    for (int64_t block = blocks.begin; block < blocks.end; ++block) key_block(block * kKeys);
  }

 private:
  Carver carve(Carver memory) {
    const int64_t rows = row_blocks_ * kRows;
    q_columns_ = memory.take<Unit>(rows * depth_);
    dout_columns_ = memory.take<Unit>(rows * depth_);
    q_pairs_ = memory.take<Unit>(rows / kPer * width_);
    dout_pairs_ = memory.take<Unit>(rows / kPer * width_);
    lse_ = memory.take<float>(rows);
    delta_ = memory.take<float>(rows);
    places_ = memory.take<float>(p_.slopes ? rows : 0);
    slopes_ = memory.take<float>(p_.slopes ? rows : 0);
    bias_gradients_ = memory.take<float>(p_.dbias.data ? kStrip * kScoreRow : 0);
    visible_begin_ = memory.take<int32_t>(rows);
    visible_end_ = memory.take<int32_t>(rows);
    const int64_t pattern_rows = pattern_.active() ? rows : 0;
    local_ = memory.take<int32_t>(pattern_rows);
    low_ = memory.take<int32_t>(pattern_rows);
    high_ = memory.take<int32_t>(pattern_rows);
    dropout_bits_ = memory.take<uint32_t>(dropout_.active() ? kStrip / 2 * kScoreRow : 0);
    k_rows_ = memory.take<Unit>(kKeys * depth_);
    v_rows_ = memory.take<Unit>(kKeys * depth_);
    k_transposed_ = memory.take<Unit>(width_ * kKeyRow);
    dk_ = memory.take<float>(kKeys * width_);
    dv_ = memory.take<float>(kKeys * width_);
    scores_ = memory.take<float>(kStrip * kScoreRow);
    gradients_ = memory.take<float>(kStrip * kScoreRow);
    cap_slopes_ = memory.take<float>(p_.soft_cap > 0 ? kStrip * kScoreRow : 0);
    gradient_units_ = memory.take<Unit>(kKeys / kPer * kScoreRow);
    return memory;
  }

  void prepare_rows() {
    const QueryRows<const T> q(p_.q, s_), dout(p_.dout, s_), out(p_.out, s_);
    const LseRows<const float> lse(p_.lse, p_, s_), dlse(p_.dlse, p_, s_);
    const int64_t size = p_.head_dim;
    for (int64_t block = 0; block < row_blocks_; ++block) {
      const int64_t first = block * kRows, count = at_most(s_.rows() - first, kRows);
      const int64_t padded = round_up(count, kStrip);  // no more is ever read: few where documents are short
      const int64_t columns = first * depth_, pairs = first / kPer * width_, panel = kRows / kPer * kLanes;
      pack_columns<Units, T>(q, first, count, padded, size, depth_, q_columns_ + columns);
      pack_columns<Units, T>(dout, first, count, padded, size, depth_, dout_columns_ + columns);
      pack_pairs<Units, T>(q, first, count, padded / kPer, panel, size, q_pairs_ + pairs);
      pack_pairs<Units, T>(dout, first, count, padded / kPer, panel, size, dout_pairs_ + pairs);
      for (int64_t row = first; row < first + padded; ++row) {
        // Rows that see nothing, and those beyond the last, get probability exp2(-inf) = 0.
        const bool real = row < first + count;
        const float value = real ? lse(row) : -kInfinity;
        lse_[row] = value == -kInfinity ? kInfinity : value * kLog2e;
        delta_[row] = real ? dot(dout(row), out(row), size) : 0;
        if (p_.dlse && value != -kInfinity) delta_[row] -= dlse(row);
        const Range keys = real ? s_.keys_of(row) : Range{0, 0};
        if (p_.slopes) {
          places_[row] = static_cast<float>(real ? s_.place_of(row) : 0);
          slopes_[row] = real ? slope_of(p_, s_, row) : 0;
        }
        visible_begin_[row] = static_cast<int32_t>(keys.begin),
        visible_end_[row] = static_cast<int32_t>(keys.end);
        if (pattern_.active()) {
          const int64_t place = pattern_.place_of(row);
          local_[row] = pattern_.local(place), low_[row] = pattern_.low(place),
          high_[row] = pattern_.high(place);
        }
      }
    }
  }

  // A sink has probability exp(sink - lse) in each row and no value: its dS is -delta times that.
  void sum_sinks() {
    for (int64_t head = 0; head < s_.group; ++head) {
      const Vec sink = splat(p_.sinks[s_.kv_head * s_.group + head] * kLog2e);
      double sum = 0;
      for (int64_t r = 0; r < s_.rows(); r += kLanes) {
        alignas(64) float terms[kLanes];
        store(terms, exp2_of<true>(sink - load(lse_ + r)) * load(delta_ + r));
        for (int i = 0; i < kLanes; ++i) sum -= (r + i) % s_.group == head ? double{terms[i]} : 0;
      }
      sinks_[head] = sum;
    }
  }

  static float dot(const T* x, const T* y, int64_t size) {
    Vec sum = {};
    for_lanes(size, [&](int64_t d, int64_t n) { sum += load_some(x + d, n) * load_some(y + d, n); });
    return reduce_add(sum);
  }

  void key_block(int64_t base) {
    const KeyRows<const T> k(p_.k, s_), v(p_.v, s_);
    const int64_t count = at_most(s_.keys - base, kKeys), padded = round_up(count, kStrip),
                  size = p_.head_dim;
    pack_rows<Units, T>(k, base, count, padded, size, depth_, false, k_rows_);
    pack_rows<Units, T>(v, base, count, padded, size, depth_, false, v_rows_);
    pack_transposed<Units, T>(k, base, count, padded / kPer, size, kKeyRow, k_transposed_);
    __builtin_memset(dk_, 0, static_cast<size_t>(padded * width_) * sizeof(float));
    __builtin_memset(dv_, 0, static_cast<size_t>(padded * width_) * sizeof(float));
    const Range rows = s_.rows_of_keys(base, base + count);
    if (!rows.empty()) {
      for (int64_t block = rows.begin / kRows; block * kRows < rows.end; ++block)
        block_pair(base, count, block);
    }
    const KeyRows<T> dk(p_.dk, s_), dv(p_.dv, s_);
    for (int64_t key = 0; key < count; ++key) {
      T *dk_row = dk(base + key), *dv_row = dv(base + key);
      const float *dk_sum = dk_ + key * width_, *dv_sum = dv_ + key * width_;
      for_lanes(size, [&](int64_t d, int64_t n) {
        store_some(dk_row + d, load(dk_sum + d) * p_.scale, n);
        store_some(dv_row + d, load(dv_sum + d) * p_.keep_scale, n);
      });
    }
  }

  // Rows of this block that see any of the keys, relative to the block, in whole steps of kStrip.
  Range rows_within(int64_t keys_begin, int64_t keys_end, int64_t first) const {
    const Range rows = s_.rows_of_keys(keys_begin, keys_end);
    const Range r{at_least(rows.begin - first, 0), at_most(rows.end - first, kRows)};
    if (r.empty()) return {0, 0};
    const Range steps{round_down(r.begin, kStrip), round_up(r.end, kStrip)};
    return pattern_.active() ? rows_of_pattern(keys_begin, keys_end, first, steps) : steps;
  }

  // From the first step of rows that sees any of the keys to the last.
  Range rows_of_pattern(int64_t keys_begin, int64_t keys_end, int64_t first, Range steps) const {
    Range hull{kRows, 0};
    for (int64_t r = steps.begin; r < steps.end; r += kStrip) {
      if (!pattern_.any(first + r, first + r + kStrip, keys_begin, keys_end)) continue;
      hull = {at_most(hull.begin, r), r + kStrip};
    }
    return hull.empty() ? Range{0, 0} : hull;
  }

  void block_pair(int64_t base, int64_t count, int64_t block) {
    const int64_t first = block * kRows;
    const Range all = rows_within(base, base + count, first);
    if (all.empty()) return;
    Range keys{kKeys, 0};
    for (int64_t key = 0; key < count; key += kStrip) {
      const Range rows = rows_within(base + key, at_most(base + key + kStrip, s_.keys), first);
      zero_gradients(key, all, rows);
      if (rows.empty()) continue;
      keys = {at_most(keys.begin, key), key + kStrip};
      strip(base, key, block, rows);
    }
    if (keys.empty()) return;
    Engine::product(k_transposed_ + keys.begin / kPer, kKeyRow,
                    {gradient_units_ + keys.begin / kPer * kScoreRow + all.begin, kScoreRow, kLanes},
                    dq_ + block * width_ * kRows + all.begin, kRows, width_, all.end - all.begin,
                    (keys.end - keys.begin) / kPer, true);
  }

  // Gradients of scores that a strip skips but the product for dQ reads.
  void zero_gradients(int64_t key, Range all, Range rows) {
    if (rows.begin == all.begin && rows.end == all.end) return;
    for (int64_t unit = key / kPer; unit < (key + kStrip) / kPer; ++unit) {
      Unit* line = gradient_units_ + unit * kScoreRow;
      for (int64_t r = all.begin; r < (rows.empty() ? all.end : rows.begin); r += kLanes)
        store_units(line + r, Vec{});
      for (int64_t r = rows.empty() ? all.end : rows.end; r < all.end; r += kLanes)
        store_units(line + r, Vec{});
    }
  }

  void strip(int64_t base, int64_t key, int64_t block, Range rows) {
    const int64_t columns = rows.end - rows.begin, first = block * kRows;
    const int64_t column_offset = (first + rows.begin) * depth_;
    Engine::product(k_rows_ + key * depth_, depth_, {q_columns_ + column_offset, kLanes, kLanes * depth_},
                    scores_ + rows.begin, kScoreRow, kStrip, columns, depth_, false);
    Engine::product(v_rows_ + key * depth_, depth_, {dout_columns_ + column_offset, kLanes, kLanes * depth_},
                    gradients_ + rows.begin, kScoreRow, kStrip, columns, depth_, false);
    if (dropout_.active()) {
      dropout_.drop_gradients<kStrip>(base + key, first, rows, p_.keep_scale, gradients_, dropout_bits_,
                                      kScoreRow);
    }
    const int64_t last = at_most(first + rows.end, s_.rows()) - 1;
    const bool whole = !pattern_.active() && s_.keys_of(last).begin <= base + key &&
                       s_.keys_of(first + rows.begin).end >= base + key + kStrip;
    if (p_.modified) {
      const float factor = modify(base + key, first, rows);
      if (whole) {
        score_gradients<true, true>(base, key, first, rows, factor);
      } else {
        score_gradients<false, true>(base, key, first, rows, factor);
      }
      if (p_.dbias.data) add_bias_gradients(base + key, first, rows);
    } else if (whole) {
      score_gradients<true, false>(base, key, first, rows, p_.scale * kLog2e);
    } else {
      score_gradients<false, false>(base, key, first, rows, p_.scale * kLog2e);
    }
    if (dropout_.active()) {
      dropout_.drop_probabilities<kStrip>(rows, dropout_bits_, kScoreRow, reinterpret_cast<Score*>(scores_),
                                          kScoreRow * static_cast<int64_t>(sizeof(float) / sizeof(Score)));
    }
    const int64_t pair_offset = first / kPer * width_ + rows.begin / kPer * kLanes,
                  panel = kRows / kPer * kLanes;
    Engine::product(reinterpret_cast<const Unit*>(scores_) + rows.begin / kPer, kScoreRow,
                    {dout_pairs_ + pair_offset, kLanes, panel}, dv_ + key * width_, width_, kStrip, width_,
                    columns / kPer, true);
    const Unit* gradient_rows =
        kPaired ? reinterpret_cast<const Unit*>(gradients_) : gradient_units_ + key * kScoreRow;
    Engine::product(gradient_rows + rows.begin / kPer, kScoreRow, {q_pairs_ + pair_offset, kLanes, panel},
                    dk_ + key * width_, width_, kStrip, width_, columns / kPer, true);
  }

  // A strip of products to scores in powers of two, in place, but for the factor that is returned.
  float modify(int64_t key, int64_t first, Range rows) {
    const RowTerms constants{places_ + first + rows.begin, slopes_ + first + rows.begin};
    const float factor = modify_keys<Engine::kFine, kStrip>(
        p_, constants, key, scores_ + rows.begin, cap_slopes_ + rows.begin, kScoreRow, rows.end - rows.begin);
    if (!p_.bias.data && !p_.mask.data) return factor;
    add_terms(key, first, rows, factor);
    return 1;
  }

  // Bias and mask lie along keys: scores are transposed for them, in blocks, and back.
  void add_terms(int64_t key, int64_t first, Range rows, float factor) {
    const int64_t keys = at_most(s_.keys - key, kStrip);
    for (int64_t r = rows.begin; r < rows.end; r += kLanes) {
      alignas(64) float lines[kLanes][kStrip];
      for (int64_t j = 0; j < kStrip; j += kLanes)
        transpose_block(scores_ + j * kScoreRow + r, kScoreRow, lines[0] + j, kStrip);
      const int64_t real = at_most(s_.rows() - first - r, kLanes);
      for (int64_t i = 0; i < real; ++i) terms_.add(first + r + i, key, lines[i], keys, factor);
      for (int64_t j = 0; j < kStrip; j += kLanes)
        transpose_block(lines[0] + j, kStrip, scores_ + j * kScoreRow + r, kScoreRow);
    }
  }

  // The gradients of a strip's scores into those of the bias, row by row: heads of a token may share one.
  void add_bias_gradients(int64_t key, int64_t first, Range rows) {
    const int64_t keys = at_most(s_.keys - key, kStrip);
    for (int64_t r = rows.begin; r < rows.end; r += kLanes) {
      const int64_t real = at_most(s_.rows() - first - r, kLanes);
      alignas(64) float lines[kLanes][kStrip];
      for (int64_t j = 0; j < kStrip; j += kLanes)
        transpose_block(bias_gradients_ + j * kScoreRow + r, kScoreRow, lines[0] + j, kStrip);
      for (int64_t i = 0; i < real; ++i) {
        float* sum = dbias_(first + r + i) + key;
        for_lanes(keys, [&](int64_t j, int64_t n) {
          store_some(sum + j, load_some(sum + j, n) + load(lines[i] + j), n);
        });
      }
    }
  }

  // Scores to probabilities, in place; their gradients to gradient_units_ and, paired, in place as rows too.
  template <bool kWhole, bool kModified>
  void score_gradients(int64_t base, int64_t key, int64_t first, Range rows, float factor) {
    const Vec scale = splat(factor);
    const bool biased = kModified && p_.dbias.data, capped = kModified && p_.soft_cap > 0;
    for (int64_t j = 0; j < kStrip; j += 2) {
      float *s0 = scores_ + j * kScoreRow, *s1 = s0 + kScoreRow;
      float *g0 = gradients_ + j * kScoreRow, *g1 = g0 + kScoreRow;
      Unit* units = gradient_units_ + (key + j) / kPer * kScoreRow;
      const int32_t at = static_cast<int32_t>(base + key + j);
      for (int64_t r = rows.begin; r < rows.end; r += kLanes) {
        const Vec lse = load(lse_ + first + r), delta = load(delta_ + first + r);
        Vec x = exp2_of<Engine::kFine>(load(s0 + r) * scale - lse);
        Vec y = exp2_of<Engine::kFine>(load(s1 + r) * scale - lse);
        if constexpr (!kWhole) {
          x = visible(at, first + r) ? x : Vec{};
          y = visible(at + 1, first + r) ? y : Vec{};
        }
        Vec dx = x * (load(g0 + r) - delta), dy = y * (load(g1 + r) - delta);
        if (biased) {
          store(bias_gradients_ + j * kScoreRow + r, dx);
          store(bias_gradients_ + (j + 1) * kScoreRow + r, dy);
        }
        if (capped) {
          dx *= load(cap_slopes_ + j * kScoreRow + r);
          dy *= load(cap_slopes_ + (j + 1) * kScoreRow + r);
        }
        Engine::store_rows(reinterpret_cast<Score*>(s0), reinterpret_cast<Score*>(s1), r, x, y);
        if constexpr (kPaired) {
          Engine::store_both(reinterpret_cast<Score*>(g0), reinterpret_cast<Score*>(g1), units, r, dx, dy);
        } else {
          Engine::store_rows(units, units + kScoreRow, r, dx, dy);
        }
      }
    }
  }

  VecI visible(int32_t key, int64_t row) const {
    const VecI begin = (VecI)load(reinterpret_cast<const float*>(visible_begin_ + row));
    const VecI end = (VecI)load(reinterpret_cast<const float*>(visible_end_ + row));
    const VecI inside = (splat_int(key) >= begin) & (splat_int(key) < end);
    return pattern_.active() ? inside & patterned(key, row) : inside;
  }

  VecI patterned(int32_t key, int64_t row) const {
    const VecI local = (VecI)load(reinterpret_cast<const float*>(local_ + row));
    const VecI low = (VecI)load(reinterpret_cast<const float*>(low_ + row));
    const VecI high = (VecI)load(reinterpret_cast<const float*>(high_ + row));
    const VecI remainder = splat_int(pattern_.remainder_of(key));
    return (splat_int(key) >= local) | ((remainder >= low) & (remainder < high));
  }

  const AttentionProblem& p_;
  const Sequence& s_;
  const int64_t row_blocks_;
  const RowDropout dropout_;
  const Pattern pattern_;
  const int64_t depth_, width_;
  const ScoreTerms terms_;
  const QueryRows<float> dbias_;
  Unit *q_columns_, *dout_columns_, *q_pairs_, *dout_pairs_, *k_rows_, *v_rows_, *k_transposed_,
      *gradient_units_;
  float *lse_, *delta_, *dk_, *dv_, *scores_, *gradients_, *cap_slopes_, *places_, *slopes_, *bias_gradients_;
  int32_t *visible_begin_, *visible_end_, *local_, *low_, *high_;
  uint32_t* dropout_bits_;
  Scratch scratch_;
  float* dq_;
  double* sinks_;
};

// Pairs of sequence and key head, told apart by whether they add to the same dbias: those of a group are one
// task's work, in order, so that its sums need neither copies nor locks.
struct BiasGroups {
  int64_t batch, kv_heads, count, members;

  explicit BiasGroups(const AttentionProblem& p)
      : batch(p.batch), kv_heads(p.kv_heads), count(1), members(1) {
    (shared_batches(p) ? members : count) *= batch;
    (shared_heads(p) ? members : count) *= kv_heads;
    strided_ = shared_batches(p) && !shared_heads(p);
  }

  // Units number sequences, then key heads.
  int64_t unit(int64_t group, int64_t member) const {
    return strided_ ? member * kv_heads + group : group * members + member;
  }

 private:
  static bool shared_batches(const AttentionProblem& p) { return p.dbias.data && !p.dbias_batches; }
  static bool shared_heads(const AttentionProblem& p) { return p.dbias.data && !p.dbias_heads; }
  bool strided_;
};

void zero_dbias(const AttentionProblem& p) {
  const int64_t rows = (p.dbias_batches ? p.batch : 1) * (p.dbias_heads ? p.heads : 1) * p.queries;
  const size_t bytes = static_cast<size_t>(p.keys) * sizeof(float);
  parallel_ranges(rows, 64, [&](int64_t begin, int64_t end) {
    __builtin_memset(static_cast<float*>(p.dbias.data) + begin * p.keys, 0,
                     static_cast<size_t>(end - begin) * bytes);
  });
}

// Parts that each sequence's keys are split into: enough tasks for 16 threads, by the shape alone so that the
// bits do not know the thread count, within 128 MiB of partial dQ.
template <class Engine>
int64_t backward_parts(const AttentionProblem& p, int64_t groups, int64_t dq_size) {
  const int64_t units = p.batch * p.kv_heads;
  const int64_t by_memory = (int64_t{128} << 20) / static_cast<int64_t>(sizeof(float)) / (units * dq_size);
  const int64_t key_blocks = (p.keys + Engine::kBackwardKeys - 1) / Engine::kBackwardKeys;
  return at_least(at_most(at_most((16 + groups - 1) / groups, key_blocks), by_memory), 1);
}

template <class Engine, class T>
void write_dq(const AttentionProblem& p, const Sequence& s, const float* dq, int64_t block) {
  const int64_t width = round_up(p.head_dim, kLanes), first = block * Engine::kBackwardRows;
  write_transposed<T>(dq + block * width * Engine::kBackwardRows, Engine::kBackwardRows,
                      at_most(s.rows() - first, Engine::kBackwardRows), p.head_dim, p.scale,
                      QueryRows<T>(p.dq, s), first);
}

// Over the sequences, in order.
void add_sink_sums(const AttentionProblem& p, const double* sums) {
  for (int64_t head = 0; head < p.heads; ++head) {
    double sum = 0;
    for (int64_t i = 0; i < p.batch; ++i) sum += sums[i * p.heads + head];
    p.dsinks[head] = static_cast<float>(sum);
  }
}

template <class Engine, class T>
void backward(const AttentionProblem& p) {
  constexpr int kRows = Engine::kBackwardRows, kKeys = Engine::kBackwardKeys;
  const int64_t units = p.batch * p.kv_heads;
  const int64_t row_blocks = (p.queries * (p.heads / p.kv_heads) + kRows - 1) / kRows;
  const int64_t dq_size = at_least(row_blocks * kRows * round_up(p.head_dim, kLanes), 1);
  const Scratch sums(p.dsinks ? static_cast<size_t>(p.batch * p.heads) * sizeof(double) : 0);
  double* sink_sums = sums.template as<double>();
  if (units == 0) {
    if (p.dsinks) add_sink_sums(p, sink_sums);
    return;
  }
  const BiasGroups groups(p);
  if (p.dbias.data) zero_dbias(p);
  const int64_t parts = backward_parts<Engine>(p, groups.count, dq_size);
  const Scratch shared(parts > 1 ? static_cast<size_t>(units * parts * dq_size) * sizeof(float) : 0);
  float* partial = shared.template as<float>();
  const auto part_of_unit = [&](int64_t unit, int64_t part) {
    const Sequence s = sequence_of(p, unit / p.kv_heads, unit % p.kv_heads);
    const int64_t blocks = (s.keys + kKeys - 1) / kKeys;
    const Scratch own(parts > 1 ? 0 : static_cast<size_t>(dq_size) * sizeof(float));
    float* dq = parts > 1 ? partial + (unit * parts + part) * dq_size : own.template as<float>();
    {
      [[maybe_unused]] const typename Engine::Scope scope;
      const FlushDenormals flush(p.modified);
      double* sinks = p.dsinks && part == 0 ? sink_sums + s.index * p.heads + s.kv_head * s.group : nullptr;
      BackwardTask<Engine, T>(p, s, dq, sinks).run({blocks * part / parts, blocks * (part + 1) / parts});
    }
    if (parts > 1) return;
    for (int64_t block = 0; block * kRows < s.rows(); ++block) write_dq<Engine, T>(p, s, dq, block);
  };
  parallel_for(groups.count * parts, [&](int64_t task, int) {
    for (int64_t member = 0; member < groups.members; ++member)
      part_of_unit(groups.unit(task / parts, member), task % parts);
  });
  if (p.dsinks) add_sink_sums(p, sink_sums);
  if (parts == 1) return;
  parallel_for(units * row_blocks, [&](int64_t task, int) {
    const int64_t unit = task / row_blocks, block = task % row_blocks;
    const Sequence s = sequence_of(p, unit / p.kv_heads, unit % p.kv_heads);
    if (block * kRows >= s.rows()) return;
    const int64_t size = kRows * round_up(p.head_dim, kLanes);
    float* sum = partial + unit * parts * dq_size;
    for (int64_t part = 1; part < parts; ++part) {
      const float* more = sum + part * dq_size + block * size;
      for (int64_t i = block * size, j = 0; j < size; i += kLanes, j += kLanes)
        store(sum + i, load(sum + i) + load(more + j));
    }
    write_dq<Engine, T>(p, s, sum, block);
  });
}

}  // namespace
}  // namespace GPTCORE_ISA_NS
}  // namespace gptcore
