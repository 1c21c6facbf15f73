// The backward body. For one stretch of the vocabulary after the other, over all tokens: logits again (unless
// forward kept them), their gradient G in both packed forms (of kept logits one serves), then from it the
// stretch's rows of dweight, finished at once, and its share of dx. Included by the _cpu and _amx files.
#pragma once

#include "kernels/linear_cross_entropy/linear_cross_entropy_forward.h"

namespace gptcore {
namespace GPTCORE_ISA_NS {
namespace {

// Words of a stretch: G of 1024 words is 2% of the logits of a vocabulary of 50k (two packed forms: 4%),
// while dx, read and written once per stretch in f32, stays far below the products' time.
constexpr int64_t kMostStretch = 1024, kLeastStretch = 256;
// Columns of a task's f32 result, beside its rows of A in L2.
constexpr int64_t kColumnChunk = 192;
constexpr int64_t kBlockStride = kColumnChunk + kGroup;
constexpr int64_t kBlockRows = 256;
// With kept logits a task makes G and dweight of few words, or takes dx of few columns over few words at a
// time: both then find their other operand, x or G of a chunk of tokens, in L2.
constexpr int64_t kKeptWords = 64, kKeptColumns = 192, kKeptDepth = 256;
// Of a packed panel of weight; not a power of two.
constexpr int64_t kColumnBytes = (kKeptDepth / kGroup + 1) * kStepBytes;

// Kept logits need no room for a stretch's G: with long stretches fewer first parts of weight come unfetched.
inline int64_t stretch_of(int64_t v, bool kept) {
  const int64_t words = v / (kept ? 8 : 32) / kLeastStretch * kLeastStretch;
  const int64_t most = kept ? 4 * kMostStretch : kMostStretch;
  return words < kLeastStretch ? kLeastStretch : words > most ? most : words;
}

template <class Policy>
struct BackwardPass {
  using P = typename Policy::P;
  static constexpr int64_t kDepth = kStepDepth<P>;
  const LinearCrossEntropyBackward& a;
  const Lines weight, x;
  const int64_t padded;                        // tokens
  const int64_t c_steps, n_steps, v_steps;     // depth of the three products
  const int64_t c_stride, n_stride, v_stride;  // and the bytes of a packed group or panel
  char *tokens, *tokens_deep;                  // x packed as B: depth C, then depth N
  char *words, *words_deep;                // the stretch of weight packed as A: depth C; transposed, depth V
  char *gradient_rows, *gradient_columns;  // G^T packed as A (depth N), G packed as B (depth V)
  float* dx_sums;                          // f32 (C, N), from kept logits (N, C)
  const int64_t dx_row;

  // What wants G by rows: sums over tokens.
  bool by_rows() const { return a.dweight || a.dbias; }

  void pack_tokens() const {
    if (!a.logits) {
      for_tasks(a, padded / kGroup,
                [&](int64_t p, int) { pack_b<P>(x, true, p * kGroup, 0, c_steps, tokens + p * c_stride); });
    }
    if (!a.dweight) return;
    for_tasks(a, ceil_div(a.c, kGroup), [&](int64_t p, int) {
      pack_b<P>(x, false, p * kGroup, 0, n_steps, tokens_deep + p * n_stride);
    });
  }

  // A step of depth of words [first, first + count) in both forms: its rows are read from memory once.
  void pack_words(int64_t first, int64_t count, int64_t step) const {
    Lines stretch = weight;
    stretch.count = first + count;  // what lies behind is packed as zeros
    const int64_t groups = ceil_div(count, kGroup), deep = a.dx ? ceil_div(a.c, kGroup) : 0;
    const int64_t word = step * kDepth;
    for (int64_t g = word / kGroup; !a.logits && g < smaller((word + kDepth) / kGroup, groups); ++g) {
      pack_a<P>(stretch, true, first + g * kGroup, 0, c_steps, words + g * c_stride);
    }
    for (int64_t c = 0; c < deep; ++c) {
      pack_a<P>(stretch, false, c * kGroup, first + word, 1, words_deep + c * v_stride + step * kStepBytes);
    }
  }

  // G of two words for kLanes tokens, in both packed forms. Word w counts within the stretch.
  inline __attribute__((always_inline)) void put(int64_t w, int64_t n, Vec g0, Vec g1) const {
    char* row = gradient_rows + w / kGroup * n_stride + n / kDepth * kStepBytes + w % kGroup * kLine +
                n % kDepth * static_cast<int64_t>(sizeof(P));
    char* column = gradient_columns + n / kGroup * v_stride + w / kDepth * kStepBytes + n % kGroup * 4;
    if constexpr (sizeof(P) == 4) {
      if (by_rows() || a.logits) {
        store(reinterpret_cast<float*>(row), g0);
        store(reinterpret_cast<float*>(row + kLine), g1);
      }
      if (a.dx && !a.logits) {
        store(reinterpret_cast<float*>(column + w % kDepth * kLine), g0);
        store(reinterpret_cast<float*>(column + (w % kDepth + 1) * kLine), g1);
      }
    } else {
      const VecH low = narrow(g0), high = narrow(g1);
      if (by_rows()) {
        *reinterpret_cast<VecHUnaligned*>(row) = low;
        *reinterpret_cast<VecHUnaligned*>(row + kLine) = high;
      }
      if (a.dx) {
        *reinterpret_cast<VecU*>(column + w % kDepth / 2 * kLine) =
            zero_extend(low) | (zero_extend(high) << 16);
      }
    }
  }

  // From logits[rows][kLanes tokens] the gradient; rows beyond `count` (up to `rows`, even) become zeros.
  void differentiate(const float* logits, int64_t stride, int64_t first, int64_t w, int64_t count,
                     int64_t rows, int64_t n) const {
    a.modified || a.class_weight ? differentiate_as<true>(logits, stride, first, w, count, rows, n)
                                 : differentiate_as<false>(logits, stride, first, w, count, rows, n);
  }

  template <bool modified>
  void differentiate_as(const float* logits, int64_t stride, int64_t first, int64_t w, int64_t count,
                        int64_t rows, int64_t n) const {
    const Vec lse = load(a.lse + n), factor = load(a.softmax_factor + n), share = load(a.target_share + n);
    const Vec uniform = a.uniform ? load(a.uniform + n) : Vec{};
    const VecI target =
        *reinterpret_cast<const VecI*>(a.targets + n) - splat_int(static_cast<int32_t>(first + w));
    const float per_cap = modified && a.soft_cap != 0 ? 1.0f / a.soft_cap : 0.0f;
    const auto gradient = [&](int64_t r) __attribute__((always_inline)) {
      if (r >= count) return Vec{};
      const Vec logit = load(logits + r * stride);
      Vec even = uniform;
      if (modified && a.class_weight) even *= a.class_weight[first + w + r];
      Vec g = exp(logit * a.scale_left - lse) * factor - even;
      g = target == splat_int(static_cast<int32_t>(r)) ? g - share : g;
      if (!modified || a.soft_cap == 0) return g;  // also where a bias of -inf bars a word
      const Vec capped = logit * per_cap;          // tanh, whose slope is 1 - tanh^2
      return g * (1.0f - capped * capped);
    };
    for (int64_t r = 0; r < rows; r += 2) put(w + r, n, gradient(r), gradient(r + 1));
  }

  // G of a group of words from kept logits.
  void gradient_of_kept(int64_t first, int64_t w, int64_t count, const float* tiles) const {
    for (int64_t n = 0; n < padded; n += kLanes) {
      differentiate(tiles + n / kGroup * kTile + n % kGroup, kGroup, first, w, count, kGroup, n);
    }
  }

  // Logits and gradient of words [first + w, first + w + rows) for kTokenChunk tokens from n.
  void gradient_task(int64_t first, int64_t w, int64_t count, int64_t rows, int64_t n) const {
    const Scratch room(static_cast<size_t>(kBlockRows * kLogitStride) * sizeof(float));
    float* logits = room.as<float>();
    const int64_t width = smaller(kTokenChunk, padded - n);
    {
      [[maybe_unused]] const typename Policy::Scope scope;
      multiply_block<Policy>(words + w / kGroup * c_stride, c_stride, ceil_div(smaller(rows, count), kGroup),
                             tokens + n / kGroup * c_stride, c_stride, width / kGroup, c_steps, logits,
                             kLogitStride, false);
    }
    for (int64_t j = 0; j < width; j += kLanes) {
      if (a.modified) modify(a, logits + j, kLogitStride, first + w, smaller(rows, count));
      differentiate(logits + j, kLogitStride, first, w, count, rows, n + j);
    }
  }

  // G of words [first, first + count), and their weight packed.
  void make_gradient(int64_t first, int64_t count) const {
    const int64_t rows = ceil_div(count, kRowPadding) * kRowPadding, packs = ceil_div(count, kDepth);
    for_tasks(a, packs, [&](int64_t step, int) { pack_words(first, count, step); });
    if (a.logits) {
      for_tasks(a, rows / kRowPadding, [&](int64_t t, int) {
        for (int64_t w = t * kRowPadding; w < (t + 1) * kRowPadding; w += kGroup) {
          gradient_of_kept(first, w, count - w, a.logits + (first + w) / kGroup * kept_stride(padded));
        }
      });
      return;
    }
    const int64_t blocks = ceil_div(rows, kBlockRows), chunks = ceil_div(padded, kTokenChunk);
    for_tasks(a, blocks * chunks, [&](int64_t t, int) {
      const int64_t w = t / chunks * kBlockRows;
      gradient_task(first, w, count - w, smaller(kBlockRows, rows - w), t % chunks * kTokenChunk);
    });
  }

  void load_words(float* block, int64_t word, int64_t rows, int64_t column, int64_t width) const {
    const float* in = static_cast<const float*>(a.dweight) + word * a.dweight_stride + column;
    for (int64_t r = 0; r < rows; ++r) {
      __builtin_memcpy(block + r * kBlockStride, in + r * a.dweight_stride,
                       static_cast<size_t>(width) * sizeof(float));
    }
  }

  template <class T>
  void store_words(const float* block, int64_t word, int64_t rows, int64_t column, int64_t width) const {
    T* out = static_cast<T*>(a.dweight) + word * a.dweight_stride + column;
    for (int64_t r = 0; r < rows; ++r) {
      for_lanes(width, [&](int64_t j, int64_t n) {
        Vec value = load_some(block + r * kBlockStride + j, n);
        if (a.accumulate) value += load_some(out + r * a.dweight_stride + j, n);
        store_some(out + r * a.dweight_stride + j, value, n);
      });
    }
  }

  // Panels of dweight (f32, whole groups and panels) = or += G^T x, where they lie. The next tile is fetched
  // from memory while one is multiplied.
  void multiply_in_place(const char* g, const char* tokens_of, int64_t groups, int64_t panels,
                         float* out) const {
    [[maybe_unused]] const typename Policy::Scope scope;
    constexpr int64_t kTall = Policy::kGroups, kWide = Policy::kPanels;
    const int64_t ldc = a.dweight_stride;
    for (int64_t p = 0; p < panels; p += kWide) {
      const int64_t wide = smaller(kWide, panels - p);
      for (int64_t step = 0; step < n_steps; step += Policy::kBlockSteps) {
        for (int64_t r = 0; r < groups; r += kTall) {
          float* tile = out + r * kGroup * ldc + p * kGroup;
          if (step == 0 && r + kTall < groups) {
            for (int64_t i = kTall * kGroup; i < 2 * kTall * kGroup; ++i) {
              for (int64_t j = 0; j < wide; ++j) __builtin_prefetch(tile + i * ldc + j * kGroup, 1, 2);
            }
          }
          Policy::multiply(g + r * n_stride + step * kStepBytes, n_stride, smaller(kTall, groups - r),
                           tokens_of + p * n_stride + step * kStepBytes, n_stride, wide,
                           smaller(Policy::kBlockSteps, n_steps - step), tile, ldc, a.resume || step > 0);
        }
      }
    }
  }

  // dweight[word .., column ..] = G^T x over all tokens.
  void weight_task(int64_t word, int64_t w, int64_t rows, int64_t column) const {
    const int64_t width = smaller(kColumnChunk, a.c - column);
    const bool whole = rows % kGroup == 0 && width % kGroup == 0;
    if (whole && a.dweight_dtype == DType::f32 && !a.accumulate) {
      multiply_in_place(gradient_rows + w / kGroup * n_stride, tokens_deep + column / kGroup * n_stride,
                        rows / kGroup, width / kGroup,
                        static_cast<float*>(a.dweight) + word * a.dweight_stride + column);
      return;
    }
    const Scratch room(static_cast<size_t>(kBlockRows * kBlockStride) * sizeof(float));
    if (a.resume) load_words(room.as<float>(), word, rows, column, width);
    {
      [[maybe_unused]] const typename Policy::Scope scope;
      multiply_block<Policy>(gradient_rows + w / kGroup * n_stride, n_stride, ceil_div(rows, kGroup),
                             tokens_deep + column / kGroup * n_stride, n_stride, ceil_div(width, kGroup),
                             n_steps, room.as<float>(), kBlockStride, a.resume);
    }
    if (a.dweight_dtype == DType::f32) {
      store_words<float>(room.as<float>(), word, rows, column, width);
    } else {
      store_words<bf16>(room.as<float>(), word, rows, column, width);
    }
  }

  // dbias[word ..] += the sums of G over all tokens, kMostTokens after kMostTokens: forward with gradients
  // has G of so many at a time and adds the same numbers in the same order.
  void bias_task(int64_t word, int64_t w, int64_t rows) const {
    constexpr int64_t kSteps = kMostTokens / kDepth;
    for (int64_t r = 0; r < rows; ++r) {
      const char* row = gradient_rows + (w + r) / kGroup * n_stride + (w + r) % kGroup * kLine;
      for (int64_t step = 0; step < n_steps; step += kSteps) {
        Vec sum = {};
        for (int64_t i = step; i < smaller(step + kSteps, n_steps); ++i) {
          const P* line = reinterpret_cast<const P*>(row + i * kStepBytes);
          for (int64_t j = 0; j < kDepth; j += kLanes) sum += load(line + j);
        }
        a.dbias[word + r] += reduce_add(sum);
      }
    }
  }

  // dx^T[row .., n ..] += weight^T G^T over the stretch.
  void token_task(int64_t row, int64_t n, int64_t steps, bool add) const {
    const int64_t rows = smaller(kBlockRows, ceil_div(a.c, kGroup) * kGroup - row);
    [[maybe_unused]] const typename Policy::Scope scope;
    multiply_block<Policy>(words_deep + row / kGroup * v_stride, v_stride, rows / kGroup,
                           gradient_columns + n / kGroup * v_stride, v_stride,
                           smaller(kColumnChunk, padded - n) / kGroup, steps, dx_sums + row * dx_row + n,
                           dx_row, add);
  }

  void stretch(int64_t first, int64_t count) const {
    make_gradient(first, count);
    const int64_t steps = ceil_div(count, kDepth), parts = ceil_div(padded, kColumnChunk);
    const int64_t columns = ceil_div(a.c, kColumnChunk);
    const int64_t weight_tasks = a.dweight ? ceil_div(count, kBlockRows) * columns : 0;
    const int64_t token_tasks = a.dx ? ceil_div(a.c, kBlockRows) * parts : 0;
    const int64_t bias_tasks = a.dbias ? ceil_div(count, kBlockRows) : 0;
    for_tasks(a, token_tasks + weight_tasks + bias_tasks, [&](int64_t t, int) {
      if (t < token_tasks) {
        token_task(t / parts * kBlockRows, t % parts * kColumnChunk, steps, first > 0);
      } else if ((t -= token_tasks) < weight_tasks) {
        const int64_t w = t / columns * kBlockRows;
        weight_task(first + w, w, smaller(kBlockRows, count - w), t % columns * kColumnChunk);
      } else {
        const int64_t w = (t - weight_tasks) * kBlockRows;
        bias_task(first + w, w, smaller(kBlockRows, count - w));
      }
    });
  }

  // G, dbias and dweight of words [first + w, ...) of a stretch of `count`.
  void kept_word_task(int64_t first, int64_t count, int64_t w) const {
    const int64_t rows = smaller(kKeptWords, count - w);
    for (int64_t g = w; g < w + rows; g += kGroup) {  // in place
      gradient_of_kept(first, g, count - g,
                       reinterpret_cast<const float*>(gradient_rows + g / kGroup * n_stride));
    }
    if (a.dbias) bias_task(first + w, w, rows);
    for (int64_t column = 0; a.dweight && column < a.c; column += kColumnChunk) {
      weight_task(first + w, w, rows, column);
    }
  }

  // A part of `panels` panels of weight, packed as B.
  void pack_columns(const Lines& part, int64_t word, int64_t steps, int64_t column, int64_t panels,
                    char* packed) const {
    for (int64_t step = 0; step < steps; ++step) {
      for (int64_t p = 0; p < panels; ++p) {
        pack_b<P>(part, false, column + p * kGroup, word + step * kGroup, 1,
                  packed + p * kColumnBytes + step * kStepBytes);
      }
    }
  }

  // dx[all tokens, panels] += G weight over the words that are packed. Of G, which begins at g and goes on
  // for `left` groups of words, the next block of depth is fetched while one is multiplied.
  void multiply_kept(const char* g, int64_t left, const char* packed, int64_t panels, int64_t steps,
                     float* out, bool add, Fetch weight_fetch) const {
    const int64_t groups = padded / kGroup, calls = ceil_div(panels, Policy::kPanels) * groups;
    for (int64_t step = 0, deep; step < steps; step += deep) {
      deep = smaller(Policy::kBlockSteps, steps - step);
      const int64_t next = step + deep;
      Fetch fetch(g + next * n_stride, smaller(Policy::kBlockSteps, left - next), groups * kStepBytes,
                  n_stride, calls);
      for (int64_t p = 0, wide; p < panels; p += wide) {
        wide = panels_at_once<Policy>(panels - p);
        for (int64_t n = 0; n < groups; ++n) {
          fetch.some();
          weight_fetch.some();
          Policy::template multiply_group<PackedColumns>(
              g + step * n_stride + n * kStepBytes, n_stride, packed + p * kColumnBytes + step * kStepBytes,
              kColumnBytes, wide, deep, out + n * kGroup * dx_row + p * kGroup, dx_row, add || step > 0);
        }
      }
    }
  }

  // dx[all tokens, column ..] += G weight over the stretch. No other task wants these columns of weight, so
  // they are packed here, a part of L2 at a time, while the next part is fetched from memory.
  void kept_token_task(int64_t first, int64_t count, int64_t column) const {
    const int64_t panels = smaller(kKeptColumns / kGroup, ceil_div(a.c, kGroup) - column / kGroup);
    const int64_t calls = ceil_div(panels, Policy::kPanels) * (padded / kGroup);
    const Scratch packed(static_cast<size_t>(panels * kColumnBytes));
    Lines stretch = weight;
    stretch.count = first + count;  // what lies behind is packed as zeros
    for (int64_t w = 0; w < count; w += kKeptDepth) {
      const int64_t steps = ceil_div(smaller(kKeptDepth, count - w), kGroup), next = w + kKeptDepth;
      pack_columns(stretch, first + w, steps, column, panels, packed.as<char>());
      multiply_kept(gradient_rows + w / kGroup * n_stride, ceil_div(count - w, kGroup), packed.as<char>(),
                    panels, steps, dx_sums + column, first + w > 0,
                    fetch_weight(weight, first + next, smaller(kKeptDepth, count - next), column,
                                 panels * kGroup, calls * ceil_div(steps, Policy::kBlockSteps)));
    }
  }

  template <class T>
  void store_kept_tokens() const {
    for_tasks(a, a.n, [&](int64_t n, int) {
      T* out = static_cast<T*>(a.dx) + a.rows[n] * a.dx_stride;
      for_lanes(a.c, [&](int64_t c, int64_t lanes) {
        store_some(out + c, load_some(dx_sums + n * dx_row + c, lanes), lanes);
      });
    });
  }

  template <class T>
  void store_tokens() const {
    for_tasks(a, padded / kGroup, [&](int64_t p, int) {
      alignas(64) Line32 tile[16];
      const int64_t rows = smaller(kGroup, a.n - p * kGroup);
      for (int64_t c = 0; c < a.c; c += kGroup) {
        for (int64_t r = 0; r < kGroup; ++r) {
          tile[r] = *reinterpret_cast<const Line32Unaligned*>(dx_sums + (c + r) * dx_row + p * kGroup);
        }
        transpose_words(tile);
        for (int64_t r = 0; r < rows; ++r) {
          T* out = static_cast<T*>(a.dx) + a.rows[p * kGroup + r] * a.dx_stride + c;
          for_lanes(smaller(kGroup, a.c - c), [&](int64_t j, int64_t n) {
            store_some(out + j, load(reinterpret_cast<const float*>(tile + r) + j), n);
          });
        }
      }
    });
  }
};

// Stretches of `words` words from kept logits: in one loop dx of one stretch, and G and dweight of the next.
template <class Policy>
void backward_of_kept(const BackwardPass<Policy>& pass, int64_t words) {
  const LinearCrossEntropyBackward& a = pass.a;
  const auto of_stretch = [&](int64_t s) {
    BackwardPass<Policy> part = pass;
    part.gradient_rows += s * (words / kGroup * pass.n_stride);
    return part;
  };
  const int64_t stretches = ceil_div(a.v, words);
  for (int64_t s = 0; s <= stretches; ++s) {
    const int64_t first = s * words, before = first - words;
    const int64_t count = s < stretches ? smaller(words, a.v - first) : 0;
    const int64_t done = s > 0 ? smaller(words, a.v - before) : 0;
    const int64_t token_tasks = a.dx && done > 0 ? ceil_div(a.c, kKeptColumns) : 0;
    for_tasks(a, token_tasks + ceil_div(count, kKeptWords), [&](int64_t t, int) {
      if (t < token_tasks) {  // the longer ones first
        of_stretch(s - 1).kept_token_task(before, done, t * kKeptColumns);
      } else {
        of_stretch(s).kept_word_task(first, count, (t - token_tasks) * kKeptWords);
      }
    });
  }
}

template <class Policy>
void backward(const LinearCrossEntropyBackward& a) {
  using P = typename Policy::P;
  constexpr int64_t kDepth = kStepDepth<P>;
  // Kept logits of f32 products become G where they lie; else G lies apart, in both packed forms.
  const bool apart = !a.logits || sizeof(P) != 4;
  const int64_t padded = ceil_div(a.n, kRowPadding) * kRowPadding, words = stretch_of(a.v, !apart);
  const int64_t c_steps = ceil_div(a.c, kDepth), n_steps = padded / kDepth, v_steps = words / kDepth;
  const int64_t c_stride = c_steps * kStepBytes, v_stride = v_steps * kStepBytes;
  const int64_t n_stride = apart ? n_steps * kStepBytes : kept_stride(padded) * 4;
  const int64_t c_groups = ceil_div(a.c, kGroup), panels = padded / kGroup, v_groups = words / kGroup;
  // Not a power of two: rows of a tile would share a cache set.
  const int64_t dx_lines = apart ? c_groups * kGroup : padded,
                dx_row = (apart ? padded : c_groups * kGroup) + kGroup;
  const auto bytes = [](bool wanted, int64_t count) {
    return wanted ? static_cast<size_t>(count) : size_t{0};
  };
  const Scratch tokens(bytes(!a.logits, panels * c_stride)),
      tokens_deep(bytes(a.dweight, c_groups * n_stride));
  const Scratch packed(bytes(!a.logits, v_groups * c_stride)),
      packed_deep(bytes(apart && a.dx, c_groups * v_stride));
  const Scratch rows(bytes(apart && (a.dweight || a.dbias), v_groups * n_stride)),
      columns(bytes(apart && a.dx, panels * v_stride));
  const Scratch dx(bytes(a.dx, dx_lines * dx_row * 4));
  const BackwardPass<Policy> pass{a,
                                  weight_lines(a),
                                  token_lines(a),
                                  padded,
                                  c_steps,
                                  n_steps,
                                  v_steps,
                                  c_stride,
                                  n_stride,
                                  v_stride,
                                  tokens.as<char>(),
                                  tokens_deep.as<char>(),
                                  packed.as<char>(),
                                  packed_deep.as<char>(),
                                  apart ? rows.as<char>() : reinterpret_cast<char*>(a.logits),
                                  columns.as<char>(),
                                  dx.as<float>(),
                                  dx_row};
  pass.pack_tokens();
  if constexpr (sizeof(P) == 4) {
    if (!apart) {
      backward_of_kept(pass, words);
      if (!a.dx) return;
      a.x_dtype == DType::f32 ? pass.template store_kept_tokens<float>()
                              : pass.template store_kept_tokens<bf16>();
      return;
    }
  }
  for (int64_t first = 0; first < a.v; first += words) pass.stretch(first, smaller(words, a.v - first));
  if (!a.dx) return;
  if (a.x_dtype == DType::f32) {
    pass.template store_tokens<float>();
  } else {
    pass.template store_tokens<bf16>();
  }
}

}  // namespace
}  // namespace GPTCORE_ISA_NS
}  // namespace gptcore
