#include "core/arena.h"
#include "core/parallel.h"
#include "core/simd.h"
#include "kernels/embedding/embedding_body.h"

namespace gptcore {
namespace GPTCORE_ISA_NS {
namespace {

// Rows of the table in one task: 64 x 768 f32 are 192 KiB, which hides the cost of a task and leaves enough
// of them to balance ids that occur often.
constexpr int64_t kTaskRows = 64;

// An id with more occurrences than this becomes tasks of its own, split by columns, so that a text of one
// token still uses all threads.
constexpr int64_t kManyOccurrences = 256;

// Running sums held in registers at a time.
constexpr int kSums = 8;

// Columns [begin, end) of one row: the sum over its occurrences, in order.
template <class G, class W>
GPTCORE_INLINE void sum_row(const EmbeddingBackward& a, int64_t v, int64_t begin, int64_t end) {
  const int32_t *first = a.order + a.vocabulary_start[v], *last = a.order + a.vocabulary_start[v + 1];
  const G* grad = static_cast<const G*>(a.grad_out);
  W* row = static_cast<W*>(a.dweight) + v * a.width;
  int64_t c = begin;
  for (; c + kSums * kLanes <= end; c += kSums * kLanes) {
    Vec sums[kSums] = {};
    for (const int32_t* n = first; n != last; ++n) {
      const G* source = grad + *n * a.grad_stride + c;
      for (int s = 0; s < kSums; ++s) sums[s] += load(source + s * kLanes);
    }
    for (int s = 0; s < kSums; ++s) {
      store(row + c + s * kLanes, a.accumulate ? load(row + c + s * kLanes) + sums[s] : sums[s]);
    }
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

bool is_frequent(const EmbeddingBackward& a, int64_t v) {
  return a.vocabulary_start[v + 1] - a.vocabulary_start[v] > kManyOccurrences;
}

template <class G, class W>
void table_rows(const EmbeddingBackward& a, int64_t begin, int64_t end) {
  for (int64_t v = begin; v < end; ++v) {
    if (a.vocabulary_start[v] == a.vocabulary_start[v + 1]) {
      if (a.accumulate) continue;
      W* row = static_cast<W*>(a.dweight) + v * a.width;
      __builtin_memset(row, 0, static_cast<size_t>(a.width) * sizeof(W));
    } else if (!is_frequent(a, v)) {
      sum_row<G, W>(a, v, 0, a.width);
    }
  }
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
  constexpr int64_t kColumns = kSums * kLanes;
  const int64_t across = (a.width + kColumns - 1) / kColumns;
  const int64_t blocks = (a.vocabulary + kTaskRows - 1) / kTaskRows, first = frequent_count * across;
  const auto task_body = [&](int64_t task) {
    if (task < first) {  // the frequent ones first, since they take longest
      const int64_t begin = task % across * kColumns;
      const int64_t end = begin + kColumns < a.width ? begin + kColumns : a.width;
      sum_row<G, W>(a, frequent[task / across], begin, end);
    } else {
      const int64_t begin = (task - first) * kTaskRows;
      table_rows<G, W>(a, begin, begin + kTaskRows < a.vocabulary ? begin + kTaskRows : a.vocabulary);
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
    {{backward<float, float>, backward<float, bf16>}, {backward<bf16, float>, backward<bf16, bf16>}}};

}  // namespace GPTCORE_ISA_NS
}  // namespace gptcore
