#include "core/arena.h"
#include "core/parallel.h"
#include "core/simd.h"
#include "core/stream.h"
#include "kernels/embedding/embedding_body.h"

namespace gptcore {
namespace GPTCORE_ISA_NS {
namespace {

// Bytes copied by one thread before a second one pays.
constexpr int64_t kGrainBytes = 64 << 10;
constexpr int64_t kCacheLine = 64;

// Rows that are asked for ahead of the one at work: rows lie anywhere, where the processor's own prefetching
// starts anew with each.
constexpr int64_t kRowsAhead = 2;

// Copies a row while `later`, a row to come, is on its way.
GPTCORE_INLINE void copy_row(const char* from, const char* later, char* to, int64_t bytes, bool past_caches) {
  int64_t at = 0;
  if (past_caches) {
    for (; at < bytes; at += kCacheLine) {
      __builtin_prefetch(later + at);
      for (int64_t i = at; i < at + kCacheLine; i += static_cast<int64_t>(sizeof(Vec))) {
        stream(reinterpret_cast<float*>(to + i), load(reinterpret_cast<const float*>(from + i)));
      }
    }
    return;
  }
  for (; at + kCacheLine <= bytes; at += kCacheLine) {
    __builtin_prefetch(later + at);
    __builtin_memcpy(to + at, from + at, kCacheLine);
  }
  __builtin_memcpy(to + at, from + at, static_cast<size_t>(bytes - at));
}

template <class Id>
void forward(const EmbeddingForward& a) {
  const Id* ids = static_cast<const Id*>(a.ids);
  const bool past_caches =
      a.row_bytes % kCacheLine == 0 && can_stream(a.out, a.out_stride, a.count * a.row_bytes);
  parallel_ranges(a.count, kGrainBytes / (a.row_bytes + 1) + 1, [&](int64_t begin, int64_t end) {
    for (int64_t n = begin; n < end; ++n) {
      const int64_t later = n + kRowsAhead < end ? n + kRowsAhead : n;
      copy_row(a.table + ids[n] * a.table_stride, a.table + ids[later] * a.table_stride,
               a.out + n * a.out_stride, a.row_bytes, past_caches);
    }
    if (past_caches) stream_fence();
  });
}

// Rows of the table in one task: 64 x 768 f32 are 192 KiB, which hides the cost of a task and leaves enough
// of them to balance ids that occur often.
constexpr int64_t kTaskRows = 64;

// An id with more occurrences than this becomes tasks of its own, split by columns, so that a text of one
// token still uses all threads.
constexpr int64_t kManyOccurrences = 256;

// Running sums held in registers at a time: as many as hide the latency of an addition, and for what is left of
// a narrow row half of them, so that it too reads its occurrences once.
constexpr int kSums = 8;

// kCount vectors of columns of one row: the sum over its occurrences, in order. What goes past the caches does
// not accumulate.
template <int kCount, class G, class W>
GPTCORE_INLINE void sum_columns(const EmbeddingBackward& a, const int32_t* first, const int32_t* last,
                                const G* grad, W* target, bool past_caches) {
  Vec sums[kCount] = {};
  for (const int32_t* n = first; n != last; ++n) {
    const G* source = grad + *n * a.grad_stride;
    for (int s = 0; s < kCount; ++s) sums[s] += load(source + s * kLanes);
  }
  if (past_caches) {
    for (int s = 0; s < kCount; s += 2) stream(target + s * kLanes, sums[s], sums[s + 1]);
    return;
  }
  for (int s = 0; s < kCount; ++s) {
    store(target + s * kLanes, a.accumulate ? load(target + s * kLanes) + sums[s] : sums[s]);
  }
}

// Columns [begin, end) of one row.
template <class G, class W>
GPTCORE_INLINE void sum_row(const EmbeddingBackward& a, int64_t v, int64_t begin, int64_t end,
                            bool past_caches) {
  const int32_t *first = a.order + a.vocabulary_start[v], *last = a.order + a.vocabulary_start[v + 1];
  const G* grad = static_cast<const G*>(a.grad_out);
  W* row = static_cast<W*>(a.dweight) + v * a.width;
  int64_t c = begin;
  for (; c + kSums * kLanes <= end; c += kSums * kLanes) {
    sum_columns<kSums>(a, first, last, grad + c, row + c, past_caches);
  }
  if (c + kSums / 2 * kLanes <= end) {
    sum_columns<kSums / 2>(a, first, last, grad + c, row + c, past_caches);
    c += kSums / 2 * kLanes;
  }
  for_lanes(end - c, [&](int64_t offset, int64_t lanes) {
    Vec sum = {};
    for (const int32_t* n = first; n != last; ++n) {
      sum += load_some(grad + *n * a.grad_stride + c + offset, lanes);
    }
    W* target = row + c + offset;
    store_some(target, a.accumulate ? load_some(target, lanes) + sum : sum, lanes);
  });
}

// Asks for the gradient that is summed `kRowsAhead` occurrences after those of row v, into the second-level
// cache, while rows between are zeroed.
template <class G>
GPTCORE_INLINE void fetch_later(const EmbeddingBackward& a, int64_t v) {
  const int64_t later = a.vocabulary_start[v + 1] + kRowsAhead - 1;
  if (later >= a.tokens) return;
  const G* row = static_cast<const G*>(a.grad_out) + a.order[later] * a.grad_stride;
  const char* p = reinterpret_cast<const char*>(row);
  const int64_t bytes = a.width * static_cast<int64_t>(sizeof(G));
  for (int64_t at = 0; at < bytes; at += kCacheLine) __builtin_prefetch(p + at, 0, 2);
}

bool is_frequent(const EmbeddingBackward& a, int64_t v) {
  return a.vocabulary_start[v + 1] - a.vocabulary_start[v] > kManyOccurrences;
}

bool is_empty(const EmbeddingBackward& a, int64_t v) {
  return a.vocabulary_start[v] == a.vocabulary_start[v + 1];
}

// Rows without occurrences, most of a large table, are zeroed by runs and, where the table is large, past
// the caches.
template <class G, class W>
void table_rows(const EmbeddingBackward& a, int64_t begin, int64_t end, bool streams, bool past_caches) {
  const int64_t row_bytes = a.width * static_cast<int64_t>(sizeof(W));
  for (int64_t v = begin; v < end; ++v) {
    if (!is_empty(a, v)) {
      if (is_frequent(a, v)) continue;
      fetch_later<G>(a, v);
      sum_row<G, W>(a, v, 0, a.width, past_caches);
    } else if (!a.accumulate) {
      const int64_t first = v;
      while (v + 1 < end && is_empty(a, v + 1)) ++v;
      char* start = static_cast<char*>(a.dweight) + first * row_bytes;
      const int64_t bytes = (v + 1 - first) * row_bytes;
      streams ? stream_zeros(start, bytes) : (void)__builtin_memset(start, 0, static_cast<size_t>(bytes));
    }
  }
  if (streams) stream_fence();
}

template <class G, class W>
void backward(const EmbeddingBackward& a) {
  const Scratch scratch(static_cast<size_t>(a.tokens / kManyOccurrences + 1) * sizeof(int32_t));
  int32_t* frequent = scratch.as<int32_t>();
  int64_t frequent_count = 0;
  if (a.tokens > kManyOccurrences) {
    for (int64_t v = 0; v < a.vocabulary; ++v) {
      if (is_frequent(a, v)) frequent[frequent_count++] = static_cast<int32_t>(v);
    }
  }
  const int64_t row_bytes = a.width * static_cast<int64_t>(sizeof(W)), bytes = a.vocabulary * row_bytes;
  const bool streams = bytes >= kStreamZeroBytes && !a.accumulate;
  const bool past_caches = streams && can_stream(a.dweight, row_bytes, bytes);
  constexpr int64_t kColumns = kSums * kLanes;
  const int64_t across = (a.width + kColumns - 1) / kColumns;
  const int64_t blocks = (a.vocabulary + kTaskRows - 1) / kTaskRows, first = frequent_count * across;
  const auto task_body = [&](int64_t task) {
    if (task < first) {  // the frequent ones first, since they take longest
      const int64_t begin = task % across * kColumns;
      const int64_t end = begin + kColumns < a.width ? begin + kColumns : a.width;
      sum_row<G, W>(a, frequent[task / across], begin, end, false);
    } else {
      const int64_t begin = (task - first) * kTaskRows;
      table_rows<G, W>(a, begin, begin + kTaskRows < a.vocabulary ? begin + kTaskRows : a.vocabulary, streams,
                       past_caches);
    }
  };
  if ((a.vocabulary + a.tokens) * a.width <= 32768) {
    for (int64_t task = 0; task < first + blocks; ++task) task_body(task);
  } else {
    parallel_for(first + blocks, [&](int64_t task, int) { task_body(task); });
  }
}

}  // namespace

extern const EmbeddingBodies embedding_bodies;
const EmbeddingBodies embedding_bodies = {
    {forward<int32_t>, forward<int64_t>},
    {{backward<float, float>, backward<float, bf16>}, {backward<bf16, float>, backward<bf16, bf16>}}};

}  // namespace GPTCORE_ISA_NS
}  // namespace gptcore
