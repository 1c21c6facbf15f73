#include "kernels/embedding/embedding.h"

#include <cstring>
#include <limits>

#include "core/arena.h"
#include "core/isa.h"
#include "core/rows.h"
#include "kernels/embedding/embedding_body.h"

namespace gptcore {

GPTCORE_BODIES(EmbeddingBodies, embedding_bodies)

namespace {

template <class Id>
void check_range(const Checker& check, const Id* ids, int64_t count, int64_t vocabulary) {
  uint64_t outside = 0;  // one comparison for both ends: a negative index is a large unsigned one
  for (int64_t i = 0; i < count; ++i) {
    outside += static_cast<uint64_t>(static_cast<int64_t>(ids[i])) >= static_cast<uint64_t>(vocabulary);
  }
  if (outside == 0) return;
  Id low = 0, high = 0;
  for (int64_t i = 0; i < count; ++i) {
    low = ids[i] < low ? ids[i] : low;
    high = ids[i] > high ? ids[i] : high;
  }
  check.fail("ids", "index " + std::to_string(low < 0 ? low : high),
             "indices from 0 to " + std::to_string(vocabulary - 1));
}

void check_ids(const Checker& check, const TensorView& ids, int64_t vocabulary) {
  check.input(ids, "ids", {DType::i64, DType::i32});
  check.contiguous(ids, "ids");
  const int64_t count = ids.numel();
  if (count == 0 || embedding_bodies_table.pick_device(check))
    return;  // a device's kernels look for themselves
  ids.dtype == DType::i64 ? check_range(check, ids.as<int64_t>(), count, vocabulary)
                          : check_range(check, ids.as<int32_t>(), count, vocabulary);
}

Rows check_rows(const Checker& check, const TensorView& tensor, const char* name, int64_t count,
                int64_t width) {
  const Rows rows = rows_of(check, tensor, name);
  if (rows.count != count || rows.width != width) {
    check.fail(name, describe(tensor), std::to_string(count) + " rows of " + std::to_string(width));
  }
  return rows;
}

// Counting sort, stable, so that sums run in the order of n. start has V + 2 entries: counted two places up,
// the running sum leaves each id's first place one up, and handing out places moves that to the id's end,
// which is the next one's start.
template <class Id>
void sort_by_id(const Id* ids, int64_t count, int64_t vocabulary, int32_t* start, int32_t* order) {
  std::memset(start, 0, static_cast<size_t>(vocabulary + 2) * sizeof(int32_t));
  for (int64_t n = 0; n < count; ++n) ++start[ids[n] + 2];
  for (int64_t v = 2; v <= vocabulary + 1; ++v) start[v] += start[v - 1];
  for (int64_t n = 0; n < count; ++n) order[start[ids[n] + 1]++] = static_cast<int32_t>(n);
}

}  // namespace

void embedding_forward(const TensorView& ids, const TensorView& weight, const TensorView& out) {
  const Checker check("embedding", embedding_bodies_table.device);
  check.input(weight, "weight", {DType::f32, DType::bf16});
  check.ndim(weight, "weight", 2);
  check.last_contiguous(weight, "weight");
  check_ids(check, ids, weight.size(0));
  check.output(out, "out", {weight.dtype});
  const int64_t count = ids.numel();
  const Rows rows = check_rows(check, out, "out", count, weight.size(1));
  if (count == 0 || rows.width == 0) return;
  const int64_t size = size_of(weight.dtype);
  EmbeddingForward a{};
  a.ids = ids.data, a.table = weight.as<char>(), a.out = out.as<char>();
  a.count = count, a.vocabulary = weight.size(0), a.row_bytes = rows.width * size;
  a.table_stride = weight.stride(0) * size, a.out_stride = rows.stride * size;
  embedding_bodies_table.pick(check).forward[ids.dtype == DType::i64](a);
}

void embedding_backward(const TensorView& ids, const TensorView& grad_out, const TensorView& dweight,
                        bool accumulate) {
  const Checker check("embedding_backward", embedding_bodies_table.device);
  check.output(dweight, "dweight", {DType::f32, DType::bf16});
  check.ndim(dweight, "dweight", 2);
  check.contiguous(dweight, "dweight");
  const int64_t vocabulary = dweight.size(0), count = ids.numel();
  check_ids(check, ids, vocabulary);
  check.input(grad_out, "grad_out", {DType::f32, DType::bf16});
  const Rows rows = check_rows(check, grad_out, "grad_out", count, dweight.size(1));
  constexpr int64_t kMost = std::numeric_limits<int32_t>::max() - 2;
  if (count > kMost || vocabulary > kMost) {
    check.fail("ids", std::to_string(count) + " of them", "at most 2^31 - 3, as rows of the table");
  }
  if (vocabulary == 0 || rows.width == 0) return;

  EmbeddingBackward a{};
  a.ids = ids.data, a.long_ids = ids.dtype == DType::i64;
  a.grad_out = grad_out.data, a.dweight = dweight.data;
  a.vocabulary = vocabulary, a.tokens = count, a.width = rows.width, a.grad_stride = rows.stride;
  a.accumulate = accumulate;
  const bool sorts = !embedding_bodies_table.pick_device(check);
  const Scratch scratch(sorts ? static_cast<size_t>(vocabulary + 2 + count) * sizeof(int32_t) : 0);
  if (sorts) {
    int32_t* start = scratch.as<int32_t>();
    int32_t* order = start + vocabulary + 2;
    a.long_ids ? sort_by_id(ids.as<int64_t>(), count, vocabulary, start, order)
               : sort_by_id(ids.as<int32_t>(), count, vocabulary, start, order);
    a.vocabulary_start = start, a.order = order;
  }
  embedding_bodies_table.pick(check).backward[is_bf16(grad_out)][is_bf16(dweight)](a);
}

}  // namespace gptcore
