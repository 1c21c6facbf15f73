// The forward body: logits by blocks of the vocabulary, never whole. Included by the _cpu and _amx files.
#pragma once

#include "core/arena.h"
#include "core/gemm_tile.h"
#include "core/log.h"
#include "core/tanh.h"
#include "kernels/linear_cross_entropy/linear_cross_entropy_body.h"

namespace gptcore {
namespace GPTCORE_ISA_NS {
namespace {

// Rows of weight packed together: at most 256, and at most 512 KB, half of the smallest L2 we aim at.
constexpr int64_t kMostWords = 256, kLeastWords = 32, kWordBytes = 512 << 10;
// Tokens whose logits are made before they are reduced: 256 x 96 f32 are 96 KB beside the weight in L2.
constexpr int64_t kTokenChunk = 96;
constexpr int64_t kLogitStride = kTokenChunk + kGroup;
// With few blocks of vocabulary, work is split over tokens too; packing the weight again for each part of
// this many tokens costs about a tenth of their product.
constexpr int64_t kTokenPart = 768, kEnoughTasks = 64;
// Blocks of one task, each fetched from memory while the one before is multiplied.
constexpr int64_t kBlocksInOrder = 4;
constexpr int64_t kTile = kGroup * kGroup;

inline int64_t words_per_block(int64_t c, int64_t element) {
  const int64_t words = kWordBytes / (c * element + 1) / kLeastWords * kLeastWords;
  return words < kLeastWords ? kLeastWords : words > kMostWords ? kMostWords : words;
}

GPTCORE_INLINE Lines weight_lines(const LinearCrossEntropyInputs& a) {
  return {a.weight, a.weight_dtype, a.weight_stride, nullptr, a.v, a.c};
}
GPTCORE_INLINE Lines token_lines(const LinearCrossEntropyInputs& a) {
  return {a.x, a.x_dtype, a.x_stride, a.rows, a.n, a.c};
}

// Fetches `rows` rows of `row_bytes` into L2 beside other work: a part at each of `calls` calls of some().
class Fetch {
 public:
  Fetch(const void* start, int64_t rows, int64_t row_bytes, int64_t stride, int64_t calls)
      : row_(static_cast<const char*>(start)),
        rows_(rows),
        row_bytes_(row_bytes),
        stride_(stride),
        lines_(rows > 0 ? ceil_div(ceil_div(row_bytes, kLine) * rows, calls) : 0) {}

  void some() {
    for (int64_t i = 0; i < lines_ && rows_ > 0; ++i) {
      __builtin_prefetch(row_ + at_, 0, 2);
      at_ += kLine;
      if (at_ >= row_bytes_) at_ = 0, row_ += stride_, --rows_;
    }
  }

 private:
  const char* row_;
  int64_t rows_;
  const int64_t row_bytes_, stride_, lines_;
  int64_t at_ = 0;
};

// Words [first, first + count) of weight, columns [column, column + width).
inline Fetch fetch_weight(const Lines& weight, int64_t first, int64_t count, int64_t column, int64_t width,
                          int64_t calls) {
  const int64_t element = weight.dtype == DType::f32 ? 4 : 2;
  return {static_cast<const char*>(weight.data) + (first * weight.stride + column) * element, count,
          smaller(width, weight.width - column) * element, weight.stride * element, calls};
}

// What a block of the vocabulary contributes to each token: the largest logit, the sum of exponentials
// relative to it and, where wanted, the sum of logits (for label smoothing), the sum of exponentials times
// their exponents (for the entropy) and the word of the largest logit. Layout [block][quantity][token].
struct Partials {
  float* data;
  int64_t tokens;  // padded
  int quantities;
  int total, moment;  // which quantities these are, 0: not wanted; the word follows the moment
  float* at(int64_t block, int quantity) const { return data + (block * quantities + quantity) * tokens; }
};

// Makes logits of products[words][kLanes tokens], in place, of the words from `first` on. One copy for both
// directions: so backward finds the bits of forward again.
__attribute__((noinline)) void modify(const LinearCrossEntropyInputs& a, float* products, int64_t stride,
                                      int64_t first, int64_t words) {
  const bool capped = a.soft_cap != 0;
  const Vec scale = splat(a.scale), cap = splat(a.soft_cap), per_cap = splat(capped ? 1.0f / a.soft_cap : 0);
  const float* bias = a.bias ? a.bias + first : nullptr;
  for (int64_t w = 0; w < words; ++w, products += stride) {
    Vec logit = load(products) * scale;
    if (bias) logit += bias[w];
    store(products, capped ? cap * tanh(logit * per_cap) : logit);
  }
}

// Reduces logits[words][kLanes tokens] over words, into partial results of `block` for the tokens from n on.
// The words' class weights count in the sum of logits only.
template <bool observed>
GPTCORE_INLINE void reduce_strip(const float* logits, int64_t words, float scale, const Partials& partials,
                                 int64_t block, int64_t n, const float* class_weight) {
  Vec top = splat(-__builtin_inff());
  VecI word = {};
  for (int64_t w = 0; w < words; ++w) {
    const Vec logit = load(logits + w * kLogitStride) * scale;
    if (observed) word = logit > top ? splat_int(static_cast<int32_t>(w)) : word;
    top = max(top, logit);
  }
  // All logits -inf: the exponentials are then zeros, not NaN.
  const Vec base = top == splat(-__builtin_inff()) ? splat(0.0f) : top;
  Vec sums[2] = {}, moment = {};
  const auto add = [&](int64_t w, Vec* sum) __attribute__((always_inline)) {
    const Vec exponent = load(logits + w * kLogitStride) * scale - base, e = exp(exponent);
    *sum += e;
    if (observed) moment += e * at_least(exponent, -104.0f);  // where exp() ends; not 0 times -inf
  };
  int64_t w = 0;
  for (; w + 2 <= words; w += 2) add(w, sums), add(w + 1, sums + 1);
  if (w < words) add(w, sums);
  store(partials.at(block, 0) + n, base);
  store(partials.at(block, 1) + n, sums[0] + sums[1]);
  if (observed) {
    store(partials.at(block, partials.moment) + n, moment);
    store(partials.at(block, partials.moment + 1) + n, (Vec)word);
  }
  if (!partials.total) return;
  Vec all = {};
  for (w = 0; !class_weight && w < words; ++w) all += load(logits + w * kLogitStride) * scale;
  for (w = 0; class_weight && w < words; ++w)
    all += load(logits + w * kLogitStride) * scale * class_weight[w];
  store(partials.at(block, partials.total) + n, all);
}

// The entropy log S - sum_v e_v d_v / S of each token, with exponents d relative to `top`, e = exp d and
// their sum S; and the first of the words with the largest logit.
inline void join_observed(const LinearCrossEntropyForward& a, const Partials& partials, int64_t blocks,
                          int64_t block_words, int64_t n, Vec top, Vec sum) {
  Vec moment = {}, most = splat(-__builtin_inff());
  VecI best = {};
  for (int64_t b = 0; b < blocks; ++b) {
    const Vec part = load(partials.at(b, 1) + n), from_top = load(partials.at(b, 0) + n) - top;
    const Vec share = exp(from_top) * (load(partials.at(b, partials.moment) + n) + part * from_top);
    moment += part == splat(0.0f) ? part : share;
    const Vec largest = part == splat(0.0f) ? splat(-__builtin_inff()) : load(partials.at(b, 0) + n);
    const VecI word = (VecI)load(partials.at(b, partials.moment + 1) + n);
    best = largest > most ? word + static_cast<int32_t>(b * block_words) : best;
    most = max(most, largest);
  }
  store(a.entropy + n, at_least(log(sum) - moment / sum, 0.0f));
  *reinterpret_cast<VecI*>(a.predicted + n) = best;
}

// Joins the blocks' partial results in block order.
inline void join_blocks(const LinearCrossEntropyForward& a, const Partials& partials, int64_t blocks,
                        int64_t block_words) {
  parallel_ranges(partials.tokens / kLanes, 64, [&](int64_t begin, int64_t end) {
    for (int64_t n = begin * kLanes; n < end * kLanes; n += kLanes) {
      Vec top = splat(-__builtin_inff());
      for (int64_t b = 0; b < blocks; ++b) {
        const Vec sum = load(partials.at(b, 1) + n);
        // A block of -inf alone (its sum is 0) must not raise the maximum above the others'.
        const Vec largest = load(partials.at(b, 0) + n);
        top = max(top, sum == splat(0.0f) ? splat(-__builtin_inff()) : largest);
      }
      Vec sum = {}, total = {};
      for (int64_t b = 0; b < blocks; ++b) {
        const Vec part = load(partials.at(b, 1) + n);
        const Vec share = part * exp(load(partials.at(b, 0) + n) - top);
        sum += part == splat(0.0f) ? part : share;
        if (a.logit_sum) total += load(partials.at(b, partials.total) + n);
      }
      store(a.lse + n, top + log(sum));
      if (a.logit_sum) store(a.logit_sum + n, total);
      if (a.entropy) join_observed(a, partials, blocks, block_words, n, top, sum);
    }
  });
}

// Copies logits[words][kLanes tokens], all tokens of one tile, to where backward finds them.
GPTCORE_INLINE void keep_strip(const float* logits, int64_t words, float* tile, int64_t group_stride) {
  for (int64_t g = 0; g < words; g += kGroup, tile += group_stride, logits += kGroup * kLogitStride) {
    for (int r = 0; r < kGroup; ++r) store(tile + r * kGroup, load(logits + r * kLogitStride));
  }
}

template <class Policy>
struct ForwardPass {
  using P = typename Policy::P;
  const LinearCrossEntropyForward& a;
  const Lines weight;
  const char* tokens;  // packed x
  const int64_t steps, stride, block_words;
  const Partials partials;

  // A block of words against tokens [begin, end), multiples of kRowPadding; the next block's rows of weight
  // are fetched meanwhile, where `fetch_next`.
  void task(int64_t block, int64_t begin, int64_t end, bool fetch_next) const {
    const int64_t first = block * block_words, words = smaller(block_words, a.v - first);
    const int64_t groups = ceil_div(words, kGroup), next = first + words;
    const int64_t tiles = ceil_div(end - begin, kGroup * Policy::kPanels) * ceil_div(groups, Policy::kGroups);
    Fetch fetch = fetch_weight(weight, next, fetch_next ? smaller(block_words, a.v - next) : 0, 0, a.c,
                               tiles * ceil_div(steps, Policy::kBlockSteps));
    const Scratch packed(static_cast<size_t>(groups * stride));
    for (int64_t g = 0; g < groups; ++g) {
      pack_a<P>(weight, true, first + g * kGroup, 0, steps, packed.as<char>() + g * stride);
    }
    const Scratch room(static_cast<size_t>(groups * kGroup * kLogitStride) * sizeof(float));
    float* logits = room.as<float>();
    const float* class_weight = a.class_weight ? a.class_weight + first : nullptr;
    [[maybe_unused]] const typename Policy::Scope scope;
    for (int64_t n = begin; n < end; n += kTokenChunk) {
      const int64_t width = smaller(kTokenChunk, end - n);
      multiply_block<Policy>(packed.as<char>(), stride, groups, tokens + n / kGroup * stride, stride,
                             width / kGroup, steps, logits, kLogitStride, false, [&] { fetch.some(); });
      for (int64_t j = 0; j < width; j += kLanes) {
        if (a.modified) modify(a, logits + j, kLogitStride, first, words);
        if (a.entropy) {
          reduce_strip<true>(logits + j, words, a.scale_left, partials, block, n + j, class_weight);
        } else {
          reduce_strip<false>(logits + j, words, a.scale_left, partials, block, n + j, class_weight);
        }
        if (!a.logits) continue;
        const int64_t group_stride = kept_stride(partials.tokens);
        float* tile = a.logits + first / kGroup * group_stride + (n + j) / kGroup * kTile + j % kGroup;
        keep_strip(logits + j, words, tile, group_stride);
      }
      for (int64_t j = 0; j < width; ++j) {
        const int64_t word = a.targets[n + j] - first;
        if (word >= 0 && word < words) a.target_logit[n + j] = logits[word * kLogitStride + j] * a.scale_left;
      }
    }
  }
};

template <class Policy>
void forward(const LinearCrossEntropyForward& a) {
  using P = typename Policy::P;
  const int64_t steps = ceil_div(a.c, kStepDepth<P>), stride = steps * kStepBytes;
  const int64_t padded = ceil_div(a.n, kRowPadding) * kRowPadding;
  const int64_t block_words = words_per_block(a.c, sizeof(P)), blocks = ceil_div(a.v, block_words);
  const int total = a.logit_sum ? 2 : 0, moment = a.entropy ? 2 + (total > 0) : 0;
  const int quantities = 2 + (total > 0) + (moment > 0 ? 2 : 0);
  const Scratch tokens(static_cast<size_t>(padded / kGroup * stride));
  const Scratch results(static_cast<size_t>(blocks * quantities * padded) * sizeof(float));
  const Lines x = token_lines(a);
  for_tasks(a, padded / kGroup, [&](int64_t p, int) {
    pack_b<P>(x, true, p * kGroup, 0, steps, tokens.as<char>() + p * stride);
  });
  const ForwardPass<Policy> pass{a,
                                 weight_lines(a),
                                 tokens.as<char>(),
                                 steps,
                                 stride,
                                 block_words,
                                 {results.as<float>(), padded, quantities, total, moment}};
  const int64_t part = blocks >= kEnoughTasks ? padded : kTokenPart, parts = ceil_div(padded, part);
  const int64_t run = blocks / kEnoughTasks < 1 ? 1 : smaller(blocks / kEnoughTasks, kBlocksInOrder);
  for_tasks(a, ceil_div(blocks, run) * parts, [&](int64_t t, int) {
    const int64_t begin = t % parts * part, end = smaller(begin + part, padded);
    const int64_t first = t / parts * run, last = smaller(first + run, blocks);
    for (int64_t block = first; block < last; ++block) pass.task(block, begin, end, block + 1 < last);
  });
  join_blocks(a, pass.partials, blocks, block_words);
}

}  // namespace
}  // namespace GPTCORE_ISA_NS
}  // namespace gptcore
