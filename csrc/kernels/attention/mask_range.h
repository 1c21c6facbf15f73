// Which keys a query row sees. Every mask offered here (causal, window, both, causal with a prefix) gives each
// row one interval of keys, and neither end moves back with the row; so blocks are skipped by interval arithmetic
// and no mask is ever stored.
//
// Rows number the queries of all heads that share a key head: row r is token r / group of head r % group.
// Blocks of rows then load their keys once for the whole group, and stay narrow in tokens.
#pragma once

#include <cstdint>

#include "core/simd.h"
#include "kernels/attention/attention_body.h"

namespace gptcore {
namespace GPTCORE_ISA_NS {
namespace {

GPTCORE_INLINE int64_t at_least(int64_t x, int64_t low) { return x < low ? low : x; }
GPTCORE_INLINE int64_t at_most(int64_t x, int64_t high) { return x > high ? high : x; }
GPTCORE_INLINE int64_t round_down(int64_t x, int64_t step) { return x / step * step; }
GPTCORE_INLINE int64_t round_up(int64_t x, int64_t step) { return (x + step - 1) / step * step; }

struct Range {
  int64_t begin, end;
  bool empty() const { return end <= begin; }
};

// One sequence (or packed document) and one key head of a problem.
struct Sequence {
  int64_t index;             // in the batch
  int64_t q_begin, k_begin;  // first token, when packed
  int64_t queries, keys;
  int64_t kv_head, group;
  int64_t left, right;
  int64_t prefix;  // keys that all queries see; above 0 only without a left bound
  const AttentionPages* pages;

  int64_t rows() const { return queries * group; }

  // A division costs as much as a vector of scores.
  int64_t token_of(int64_t row) const { return group == 1 ? row : row / group; }
  int64_t head_of(int64_t row) const { return kv_head * group + (group == 1 ? 0 : row % group); }
  // The key at a row's own place: causal is aligned at the bottom right.
  int64_t place_of(int64_t row) const { return token_of(row) + keys - queries; }

  // Keys that row r sees; empty ranges may lie anywhere in [0, keys].
  Range keys_of(int64_t row) const {
    const int64_t last = place_of(row);
    const int64_t begin = left < 0 ? 0 : at_most(at_least(last - left, 0), keys);
    const int64_t end = right < 0 ? keys : at_most(at_least(last + right + 1, 0), keys);
    return {begin, at_least(end, prefix)};
  }

  // Keys that any row of [begin, end) sees.
  Range keys_of_rows(int64_t begin, int64_t end) const {
    return {keys_of(begin).begin, keys_of(end - 1).end};
  }

  // Rows that see any key of [begin, end).
  Range rows_of_keys(int64_t begin, int64_t end) const {
    const int64_t shift = keys - queries;
    const int64_t first = right < 0 || begin < prefix ? 0 : at_least(begin - shift - right, 0);
    const int64_t last = left < 0 ? queries : at_most(end - shift + left, queries);
    return {first * group, last * group};
  }
};

GPTCORE_INLINE Sequence sequence_of(const AttentionProblem& p, int64_t index, int64_t kv_head) {
  Sequence s{};
  s.index = index, s.kv_head = kv_head, s.group = p.heads / p.kv_heads;
  s.queries = p.queries, s.keys = p.keys;
  if (p.cu_q) {
    s.q_begin = p.cu_q[index], s.queries = p.cu_q[index + 1] - p.cu_q[index];
    s.k_begin = p.cu_k[index], s.keys = p.cu_k[index + 1] - p.cu_k[index];
  }
  if (p.pages.table) s.keys = p.pages.lengths[index];
  s.left = p.left, s.right = p.right, s.prefix = p.prefix ? p.prefix[index] : 0;
  s.pages = &p.pages;
  return s;
}

// Rows of a query-side tensor of one sequence.
template <class T>
struct QueryRows {
  T* base;
  int64_t token, head, group;

  QueryRows(const AttentionTensor& t, const Sequence& s)
      : base(t.data ? static_cast<T*>(t.data) + s.index * t.batch + s.q_begin * t.token +
                          s.kv_head * s.group * t.head
                    : nullptr),
        token(t.token),
        head(t.head),
        group(s.group) {}

  T* operator()(int64_t row) const {
    return group == 1 ? base + row * token : base + row / group * token + row % group * head;
  }
};

// Rows of a key-side tensor: one per token.
template <class T>
struct KeyRows {
  T* base;
  int64_t token;

  KeyRows(const AttentionTensor& t, const Sequence& s)
      : base(static_cast<T*>(t.data) + s.index * t.batch + s.k_begin * t.token + s.kv_head * t.head),
        token(t.token) {}

  T* operator()(int64_t row) const { return base + row * token; }
  // Whether rows [first, first + count) lie `token` apart.
  bool even(int64_t, int64_t) const { return true; }
};

// The same of keys in pages. Rows beyond the sequence's last get an address of no meaning.
template <class T>
struct PagedRows {
  T* base;
  const int32_t* table;
  int64_t page, token, size, last_block;
  int shift;  // of a size that is a power of two, else -1: a division costs as much as a vector of products

  PagedRows(const AttentionTensor& t, const Sequence& s)
      : base(static_cast<T*>(t.data) + s.kv_head * t.head),
        table(s.pages->table + s.index * s.pages->row),
        page(t.batch),
        token(t.token),
        size(s.pages->size),
        last_block(s.keys > 0 ? (s.keys - 1) / size : 0),
        shift((size & (size - 1)) == 0 ? __builtin_ctzll(static_cast<uint64_t>(size)) : -1) {}

  int64_t block_of(int64_t row) const { return at_most(shift >= 0 ? row >> shift : row / size, last_block); }
  T* operator()(int64_t row) const {
    const int64_t block = block_of(row);
    return base + table[block] * page + (row - block * size) * token;
  }
  bool even(int64_t first, int64_t count) const { return block_of(first) == block_of(first + count - 1); }
};

// Where row r's lse stands, or what has its shape.
template <class T>
struct LseRows {
  T* base;
  int64_t head, group;

  LseRows(T* data, const AttentionProblem& p, const Sequence& s)
      : base(data + s.index * p.lse_batch + s.q_begin + s.kv_head * s.group * p.lse_head),
        head(p.lse_head),
        group(s.group) {}

  T& operator()(int64_t row) const { return group == 1 ? base[row] : base[row / group + row % group * head]; }
};

}  // namespace
}  // namespace GPTCORE_ISA_NS
}  // namespace gptcore
