#include "kernels/attention/attention.h"

#include <algorithm>
#include <cmath>

#include "core/check.h"
#include "core/fp32_precision.h"
#include "core/isa.h"
#include "kernels/attention/attention_body.h"
#include "kernels/attention/attention_pages.h"

namespace gptcore {

GPTCORE_BODIES(AttentionBodies, attention_f32_bodies)
GPTCORE_BODIES_AMX(AttentionBodies, attention_bf16_bodies)
GPTCORE_DEVICE_BODIES(AttentionBodies, attention_f16_bodies)
GPTCORE_DEVICE_BODIES(AttentionBodies, attention_tf32_bodies)

namespace {

constexpr int64_t kMaxHeadDim = 256;

// Whether another device's kernels serve the call: what lies in its tensors is then theirs to read.
bool elsewhere(const Checker& check) { return attention_f32_bodies_table.pick_device(check) != nullptr; }

AttentionTensor tensor_of(const TensorView& view) {
  const int lead = view.ndim - 3;
  return {view.data, lead ? view.stride(0) : 0, view.stride(lead), view.stride(lead + 1)};
}

// (B, T, heads, D) or (total, heads, D), of q's type and head size.
void check_tensor(const Checker& check, const TensorView& tensor, const char* name, const TensorView& q) {
  check.input(tensor, name, {q.dtype});
  check.ndim(tensor, name, q.ndim);
  check.last_contiguous(tensor, name);
}

// Cumulative lengths of documents; returns the longest, or where they are not read here `total`.
int64_t check_lengths(const Checker& check, const TensorView& lengths, const char* name, int64_t total) {
  check.input(lengths, name, {DType::i32});
  check.ndim(lengths, name, 1);
  check.contiguous(lengths, name);
  const int64_t count = lengths.size(0);
  if (count < 1) check.fail(name, "0 elements", "documents + 1 of them");
  if (elsewhere(check)) return total;
  const int32_t* at = lengths.as<int32_t>();
  if (at[0] != 0) check.fail(name, "a first element of " + std::to_string(at[0]), "0");
  int64_t longest = 0;
  for (int64_t i = 1; i < count; ++i) {
    const int64_t length = int64_t{at[i]} - at[i - 1];
    if (length < 0) {
      check.fail(
          name,
          std::to_string(at[i]) + " after " + std::to_string(at[i - 1]) + " at position " + std::to_string(i),
          "lengths that do not decrease");
    }
    if (length > longest) longest = length;
  }
  if (at[count - 1] != total) {
    check.fail(name, "a last element of " + std::to_string(at[count - 1]),
               "the number of tokens, " + std::to_string(total));
  }
  return longest;
}

void check_documents(const Checker& check, const TensorView& cu_q, const TensorView& cu_k, int64_t total_q,
                     int64_t total_k, AttentionProblem* p) {
  check.defined(cu_q, "cu_seqlens_q");
  check.defined(cu_k, "cu_seqlens_k");
  p->queries = check_lengths(check, cu_q, "cu_seqlens_q", total_q);
  p->keys = check_lengths(check, cu_k, "cu_seqlens_k", total_k);
  if (cu_q.size(0) != cu_k.size(0)) {
    check.fail("cu_seqlens_k", std::to_string(cu_k.size(0) - 1) + " documents",
               "as many as cu_seqlens_q has, " + std::to_string(cu_q.size(0) - 1));
  }
  p->batch = cu_q.size(0) - 1, p->total_q = total_q, p->total_k = total_k;
  p->cu_q = cu_q.as<int32_t>(), p->cu_k = cu_k.as<int32_t>();
}

void check_heads(const Checker& check, const TensorView& q, const TensorView& k, const char* name = "k") {
  const int64_t heads = q.size(-2), kv_heads = k.size(-2), head_dim = q.size(-1);
  if (head_dim < 1 || head_dim > kMaxHeadDim) {
    check.fail("q", "head size " + std::to_string(head_dim), "1 to 256");
  }
  if (k.size(-1) != head_dim) {
    check.fail(name, "head size " + std::to_string(k.size(-1)), "that of 'q', " + std::to_string(head_dim));
  }
  if (heads != 0 && (kv_heads == 0 || heads % kv_heads != 0)) {
    check.fail(name, std::to_string(kv_heads) + " heads",
               "a divisor of the " + std::to_string(heads) + " query heads");
  }
}

void check_per_head(const Checker& check, const TensorView& x, const char* name, const AttentionProblem& p) {
  check.input(x, name, {DType::f32});
  check.shape(x, name, {p.heads});
  check.contiguous(x, name);
}

// (H) or (B, H).
void check_slopes(const Checker& check, const TensorView& slopes, AttentionProblem* p) {
  check.input(slopes, "alibi_slopes", {DType::f32});
  if (slopes.ndim == 2) {
    check.shape(slopes, "alibi_slopes", {p->batch, p->heads});
  } else {
    check.shape(slopes, "alibi_slopes", {p->heads});
  }
  p->slopes = slopes.as<float>();
  p->slopes_batch = slopes.ndim == 2 ? slopes.stride(0) : 0;
  p->slopes_head = slopes.stride(-1);
}

// (..., T, S), each leading dimension that of the problem, 1 or missing; so may T be. Refused for documents.
AttentionTensor check_scores(const Checker& check, const TensorView& x, const char* name,
                             std::initializer_list<DType> dtypes, const AttentionProblem& p) {
  check.input(x, name, dtypes);
  if (p.cu_q) check.fail(name, "a tensor with cu_seqlens", "none");
  const int64_t sizes[] = {p.batch, p.heads, p.queries, p.keys};
  bool fits = x.ndim >= 2 && x.ndim <= 4 && x.size(-1) == p.keys;
  int64_t strides[4] = {};
  for (int d = 4 - x.ndim; fits && d < 3; ++d) {
    const int64_t size = x.size(d - 4);
    fits = size == sizes[d] || size == 1;
    strides[d] = size == 1 ? 0 : x.stride(d - 4);
  }
  if (!fits) {
    check.fail(name, describe(x),
               "a shape that broadcasts to (" + std::to_string(p.batch) + ", " + std::to_string(p.heads) +
                   ", " + std::to_string(p.queries) + ", " + std::to_string(p.keys) + ")");
  }
  check.last_contiguous(x, name);
  return {x.data, strides[0], strides[2], strides[1]};
}

// Keeps what 16 random bits below `keep` stand for; none are left to drop where p rounds to 0.
void check_dropout(const Checker& check, const AttentionOptions& options, AttentionProblem* p) {
  if (!(options.dropout_p >= 0 && options.dropout_p <= 1)) {
    check.fail("dropout_p", std::to_string(options.dropout_p), "0 to 1");
  }
  p->keep = static_cast<int32_t>(std::floor((1 - options.dropout_p) * kKeepAll + 0.5));
  p->keep_scale = p->keep ? static_cast<float>(kKeepAll) / static_cast<float>(p->keep) : 0.0f;
  if (options.dropout_p == 0) return;
  check.defined(options.seed, "seed");
  if (options.seed.device != Device::cpu || !elsewhere(check)) check.on_device(options.seed, "seed");
  check.dtype(options.seed, "seed", {DType::i64});
  if (options.seed.numel() != 1) {
    check.fail("seed", std::to_string(options.seed.numel()) + " elements", "one");
  }
  if (options.offset < 0 || options.offset > int64_t{0xffffffff}) {
    check.fail("offset", std::to_string(options.offset), "0 to 2**32 - 1");
  }
  if (elsewhere(check) && options.seed.device == check.device()) {
    p->seed_at = options.seed.as<int64_t>();
  } else {
    p->seed = static_cast<uint64_t>(*options.seed.as<int64_t>());
  }
  p->offset = static_cast<uint32_t>(options.offset);
}

// Every row must keep one interval of keys, hence no left bound.
void check_prefixes(const Checker& check, const AttentionOptions& options, AttentionProblem* p) {
  const TensorView& prefixes = options.prefix_lengths;
  if (!prefixes) return;
  check.input(prefixes, "prefix_lengths", {DType::i32});
  check.shape(prefixes, "prefix_lengths", {p->batch});
  check.contiguous(prefixes, "prefix_lengths");
  if (!options.causal || options.left != -1) {
    check.fail("prefix_lengths",
               options.causal ? "a window bounded to the left" : "attention that is not causal",
               "causal attention without a left bound");
  }
  p->prefix = prefixes.as<int32_t>();
  if (elsewhere(check)) return;
  for (int64_t i = 0; i < p->batch; ++i) {
    const int64_t keys = p->cu_k ? p->cu_k[i + 1] - p->cu_k[i] : p->keys;
    if (p->prefix[i] < 0 || p->prefix[i] > keys) {
      check.fail("prefix_lengths", std::to_string(p->prefix[i]) + " at position " + std::to_string(i),
                 "0 to the number of keys, " + std::to_string(keys));
    }
  }
}

void check_pattern(const Checker& check, const AttentionOptions& options, AttentionProblem* p) {
  const int64_t stride = options.sparse_stride, summary = options.sparse_summary;
  if (stride < 0 || stride > INT32_MAX) check.fail("sparse_stride", std::to_string(stride), "0 to 2**31 - 1");
  if (summary < 0 || summary > stride) {
    check.fail("sparse_summary", std::to_string(summary), "0 to the stride, " + std::to_string(stride));
  }
  if (stride == 0) return;
  const char* other = !options.causal                             ? "attention that is not causal"
                      : options.left != -1 || options.right != -1 ? "a window"
                      : options.prefix_lengths                    ? "prefix_lengths"
                                                                  : nullptr;
  if (other) check.fail("sparse_stride", other, "causal attention with neither window nor prefixes");
  p->stride = stride, p->summary = summary;
}

void check_options(const Checker& check, const AttentionOptions& options, DType dtype, AttentionProblem* p) {
  if (!std::isfinite(options.softmax_scale)) {
    check.fail("softmax_scale", std::to_string(options.softmax_scale), "a finite number");
  }
  if (options.left < -1 || options.right < -1) {
    check.fail("window_size", "(" + std::to_string(options.left) + ", " + std::to_string(options.right) + ")",
               "numbers of keys to the left and right, or -1 for all");
  }
  p->scale = options.softmax_scale;
  p->left = options.left, p->right = options.causal ? 0 : options.right;
  if (!std::isfinite(options.soft_cap) || options.soft_cap < 0) {
    check.fail("soft_cap", std::to_string(options.soft_cap), "a finite number above 0, or none");
  }
  p->soft_cap = options.soft_cap;
  if (options.alibi_slopes) check_slopes(check, options.alibi_slopes, p);
  if (options.attn_mask) p->mask = check_scores(check, options.attn_mask, "attn_mask", {DType::boolean}, *p);
  if (options.attn_bias) {
    p->bias = check_scores(check, options.attn_bias, "attn_bias", {DType::f32, dtype}, *p);
    p->bias_16bit = options.attn_bias.dtype != DType::f32;
  }
  if (options.sinks) {
    check_per_head(check, options.sinks, "sinks", *p);
    p->sinks = options.sinks.as<float>();
  }
  p->modified = p->soft_cap != 0 || p->slopes || p->mask.data || p->bias.data || p->sinks;
  check_dropout(check, options, p);
  check_prefixes(check, options, p);
  check_pattern(check, options, p);
}

// f16 where a device's kernels have it.
void check_type(const Checker& check, const TensorView& q) {
  check.defined(q, "q");
  check.on_device(q, "q");
  if (attention_f16_bodies_table.pick_device(check)) {
    check.dtype(q, "q", {DType::f32, DType::bf16, DType::f16});
  } else {
    check.dtype(q, "q", {DType::f32, DType::bf16});
  }
}

// What both passes take; fills everything but outputs and gradients.
AttentionProblem check_inputs(const Checker& check, const TensorView& q, const TensorView& k,
                              const TensorView& v, const TensorView& cu_q, const TensorView& cu_k,
                              const AttentionOptions& options) {
  check_type(check, q);
  const bool packed = cu_q || cu_k;
  if (q.ndim != (packed ? 3 : 4)) {
    check.fail("q", std::to_string(q.ndim) + " dimensions",
               packed ? "3, (total, H, D), with cu_seqlens" : "4, (B, T, H, D), without cu_seqlens");
  }
  check.last_contiguous(q, "q");
  check_tensor(check, k, "k", q);
  check_tensor(check, v, "v", q);
  check.same_shape(v, "v", k, "k");
  check_heads(check, q, k);
  AttentionProblem p{};
  if (packed) {
    check_documents(check, cu_q, cu_k, q.size(0), k.size(0), &p);
  } else {
    if (k.size(0) != q.size(0)) {
      check.fail("k", "batch " + std::to_string(k.size(0)), "that of 'q', " + std::to_string(q.size(0)));
    }
    p.batch = q.size(0), p.queries = q.size(1), p.keys = k.size(1);
  }
  if (elsewhere(check) && std::max(p.queries, p.keys) > kMaxDeviceTokens) {
    check.fail("q", std::to_string(std::max(p.queries, p.keys)) + " tokens", "at most 2**29 on this device");
  }
  p.q = tensor_of(q), p.k = tensor_of(k), p.v = tensor_of(v);
  p.heads = q.size(-2), p.kv_heads = k.size(-2), p.head_dim = q.size(-1);
  check_options(check, options, q.dtype, &p);
  return p;
}

void check_lse(const Checker& check, const TensorView& lse, const TensorView& q, AttentionProblem* p) {
  check.input(lse, "lse", {DType::f32});
  if (q.ndim == 4) {
    check.shape(lse, "lse", {q.size(0), q.size(2), q.size(1)});
  } else {
    check.shape(lse, "lse", {q.size(1), q.size(0)});
  }
  check.contiguous(lse, "lse");
  p->lse = lse.as<float>();
  p->lse_head = q.ndim == 4 ? q.size(1) : q.size(0);
  p->lse_batch = q.ndim == 4 ? q.size(1) * q.size(2) : 0;
}

AttentionTensor check_like(const Checker& check, const TensorView& tensor, const char* name,
                           const TensorView& like, const char* like_name, bool written) {
  check.input(tensor, name, {like.dtype});
  check.same_shape(tensor, name, like, like_name);
  check.last_contiguous(tensor, name);
  if (written) check.writable(tensor, name);
  return tensor_of(tensor);
}

void check_dbias(const Checker& check, const TensorView& dbias, const TensorView& bias, AttentionProblem* p) {
  check.output(dbias, "dbias", {DType::f32});
  check.same_shape(dbias, "dbias", bias, "attn_bias");
  check.contiguous(dbias, "dbias");
  if (dbias.size(-2) != p->queries) {
    check.fail("dbias", describe(dbias), std::to_string(p->queries) + " queries: no broadcasting over them");
  }
  p->dbias = p->bias;
  p->dbias.data = dbias.data;
  p->dbias.token = p->keys;
  p->dbias_batches = dbias.ndim == 4 && dbias.size(0) > 1;
  p->dbias_heads = dbias.ndim >= 3 && dbias.size(-3) > 1;
  p->dbias.head = p->dbias_heads ? p->queries * p->keys : 0;
  p->dbias.batch = p->dbias_batches ? dbias.size(1) * p->queries * p->keys : 0;
}

const AttentionBodies& bodies(const Checker& check, DType dtype) {
  if (dtype == DType::f16) return *attention_f16_bodies_table.pick_device(check);
  if (dtype == DType::bf16) return attention_bf16_bodies_table.pick(check);
  const AttentionBodies* tf32 = tf32_products() ? attention_tf32_bodies_table.pick_device(check) : nullptr;
  return tf32 ? *tf32 : attention_f32_bodies_table.pick(check);
}

void run_forward(const Checker& check, const TensorView& q, const TensorView& out, const TensorView& lse,
                 AttentionProblem* p) {
  p->out = check_like(check, out, "out", q, "q", true);
  if (lse) {
    check_lse(check, lse, q, p);
    check.writable(lse, "lse");
  }
  if (p->heads == 0) return;
  bodies(check, q.dtype).forward(*p);
}

}  // namespace

void attention_forward(const TensorView& q, const TensorView& k, const TensorView& v,
                       const TensorView& cu_seqlens_q, const TensorView& cu_seqlens_k,
                       const AttentionOptions& options, const TensorView& out, const TensorView& lse) {
  const Checker check("attention", attention_f32_bodies_table.device);
  AttentionProblem p = check_inputs(check, q, k, v, cu_seqlens_q, cu_seqlens_k, options);
  run_forward(check, q, out, lse, &p);
}

void attention_paged(const TensorView& q, const TensorView& k_pages, const TensorView& v_pages,
                     const TensorView& block_table, const TensorView& cache_seqlens,
                     const AttentionOptions& options, const TensorView& out, const TensorView& lse) {
  const Checker check("attention_paged", attention_f32_bodies_table.device);
  check_type(check, q);
  check.ndim(q, "q", 4);
  check.last_contiguous(q, "q");
  check_tensor(check, k_pages, "k_pages", q);
  check_tensor(check, v_pages, "v_pages", q);
  check.same_shape(v_pages, "v_pages", k_pages, "k_pages");
  check_heads(check, q, k_pages, "k_pages");
  AttentionProblem p{};
  p.batch = q.size(0), p.queries = q.size(1);
  p.heads = q.size(2), p.kv_heads = k_pages.size(2), p.head_dim = q.size(3);
  p.q = tensor_of(q), p.k = tensor_of(k_pages), p.v = tensor_of(v_pages);
  check_pages(check, k_pages, block_table, cache_seqlens, elsewhere(check), &p);
  check_paged_options(check, options);
  check_options(check, options, q.dtype, &p);
  run_forward(check, q, out, lse, &p);
}

void attention_backward(const TensorView& dout, const TensorView& q, const TensorView& k, const TensorView& v,
                        const TensorView& out, const TensorView& lse, const TensorView& cu_seqlens_q,
                        const TensorView& cu_seqlens_k, const AttentionOptions& options, const TensorView& dq,
                        const TensorView& dk, const TensorView& dv, const TensorView& dlse,
                        const TensorView& dbias, const TensorView& dsinks) {
  const Checker check("attention_backward", attention_f32_bodies_table.device);
  AttentionProblem p = check_inputs(check, q, k, v, cu_seqlens_q, cu_seqlens_k, options);
  p.dout = check_like(check, dout, "dout", q, "q", false);
  p.out = check_like(check, out, "out", q, "q", false);
  check_lse(check, lse, q, &p);
  p.dq = check_like(check, dq, "dq", q, "q", true);
  p.dk = check_like(check, dk, "dk", k, "k", true);
  p.dv = check_like(check, dv, "dv", v, "v", true);
  if (dlse) {
    check.input(dlse, "dlse", {DType::f32});
    check.same_shape(dlse, "dlse", lse, "lse");
    check.contiguous(dlse, "dlse");
    p.dlse = dlse.as<float>();
  }
  if (dbias) check_dbias(check, dbias, options.attn_bias, &p);
  if (dsinks) {
    check_per_head(check, dsinks, "dsinks", p);
    check.writable(dsinks, "dsinks");
    check.defined(options.sinks, "sinks");
    p.dsinks = dsinks.as<float>();
  }
  if (p.kv_heads == 0) return;
  bodies(check, q.dtype).backward(p);
}

}  // namespace gptcore
