#include "kernels/attention/attention_pages.h"

#include <algorithm>
#include <string>

namespace gptcore {
namespace {

// What lies in a cache's tables, as far as sequences need it.
void check_pages_read(const Checker& check, const AttentionProblem& p, int64_t blocks) {
  for (int64_t b = 0; b < p.batch; ++b) {
    const int64_t length = p.pages.lengths[b];
    if (length < 0 || length > p.keys) {
      check.fail("cache_seqlens", std::to_string(length) + " at position " + std::to_string(b),
                 "0 to blocks * page_size, " + std::to_string(p.keys));
    }
    const int32_t* table = p.pages.table + b * p.pages.row;
    for (int64_t i = 0; i < std::min(blocks, (length + p.pages.size - 1) / p.pages.size); ++i) {
      if (table[i] < 0 || table[i] >= p.pages.count) {
        check.fail(
            "block_table",
            "page " + std::to_string(table[i]) + " at (" + std::to_string(b) + ", " + std::to_string(i) + ")",
            "0 to the number of pages less one, " + std::to_string(p.pages.count - 1));
      }
    }
  }
}

}  // namespace

void check_pages(const Checker& check, const TensorView& k, const TensorView& table,
                 const TensorView& lengths, bool elsewhere, AttentionProblem* p) {
  check.input(table, "block_table", {DType::i32});
  check.shape(table, "block_table", {p->batch, -1});
  check.last_contiguous(table, "block_table");
  check.input(lengths, "cache_seqlens", {DType::i32});
  check.shape(lengths, "cache_seqlens", {p->batch});
  check.contiguous(lengths, "cache_seqlens");
  p->pages = {table.as<int32_t>(), lengths.as<int32_t>(), table.stride(0), k.size(1), k.size(0)};
  if (k.size(1) < 1) check.fail("k_pages", "pages of 0 tokens", "at least 1");
  // Without pages there is nothing that an entry of the table could be taken for.
  p->keys = k.size(0) > 0 ? table.size(1) * k.size(1) : 0;
  const int64_t most = std::max(p->keys, p->queries * (p->heads / std::max<int64_t>(p->kv_heads, 1)));
  if (elsewhere && most > kMaxDeviceTokens) {
    check.fail("q", std::to_string(most) + " tokens of a sequence, or queries of a key head",
               "at most 2**29 on this device");
  }
  if (!elsewhere) check_pages_read(check, *p, table.size(1));
}

void check_paged_options(const Checker& check, const AttentionOptions& options) {
  const char* other = options.attn_mask        ? "attn_mask"
                      : options.attn_bias      ? "attn_bias"
                      : options.dropout_p != 0 ? "dropout_p"
                      : options.prefix_lengths ? "prefix_lengths"
                      : options.sparse_stride  ? "sparse_stride"
                                               : nullptr;
  if (other) check.fail(other, "one with a cache in pages", "none");
}

}  // namespace gptcore
