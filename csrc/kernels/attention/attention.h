// Scaled dot-product attention, fused: scores and probabilities are never stored whole.
//
//   S[t,s] = softmax_scale * q[t] . k[s]       lse[t] = log sum_s exp S[t,s]       over the keys s that t
//   sees P[t,s] = exp(S[t,s] - lse[t])              out[t] = sum_s P[t,s] v[s] dv[s] = sum_t P[t,s] dout[t]
//   delta[t] = dout[t] . out[t] dS[t,s] = P[t,s] (dout[t] . v[s] - delta[t]) dq[t] = softmax_scale sum_s
//   dS[t,s] k[s]   dk[s] = softmax_scale sum_t dS[t,s] q[t]
//
// What may be done to the scores, in this order, each as far as it is given:
//   soft_cap      S = soft_cap tanh(S / soft_cap); the dS of dq and dk then counts 1 - (S / soft_cap)^2 times
//   alibi_slopes  S -= slope |t + S - T - s|, per head or per sequence and head
//   attn_bias     S += bias[t,s]; dbias = dS, summed over the sequences and heads that share it
//   attn_mask     t does not see s where it is false
//   sinks         per head: exp(sink) joins the sum of lse; dsinks = - sum_t exp(sink - lse[t]) delta[t]
// Where lse has a gradient dlse, delta[t] = dout[t] . out[t] - dlse[t].
//
// Query t sees key s where  t + S - T - left <= s <= t + S - T + right  (a negative bound: none); causal is
// right = 0, so the last query sees the last key. With prefix_lengths, which want causal and no left bound, every
// query of sequence b also sees the keys s < prefix_lengths[b]. A query that sees nothing has out 0, lse -inf (its sink)
// and gradient 0.
//
// sparse_stride above 0 is a pattern of the Sparse Transformer (Child et al. 2019), which wants causal and neither
// window nor prefixes. With i = t + S - T: strided where sparse_summary is 0, then t sees s <= i where i - s <= stride
// or stride divides i - s; else fixed, where s div stride = i div stride or s mod stride >= stride - sparse_summary.
//
// Dropout: out and dv take M P for P, dS takes M (dout . v); lse is that of P. M[t,s] = 65536 / keep where kept, else 0,
// keep = floor((1 - dropout_p) 65536 + 1/2). Kept where b < keep, b the 16 bits from 16 (s mod 8) on of the words
// that Philox4x32-10 (core/philox.h) with key `seed` makes of the counter (s div 8, t, batch H + head, offset). For
// packed tokens `batch` is the document's number, and t and s count from its first query and key.
//
// Pages: attention_paged reads keys and values from a cache in pages, which sequences of any length share: key s of
// sequence b stands at place s mod page_size of page block_table[b, s div page_size]. Its q holds the last T queries of
// every sequence, the queries' own keys being in the cache. There are soft_cap, alibi_slopes and sinks, and no backward.
//
// Shapes   q, out, dout, dq (B, T, H, D); k, v, dk, dv (B, S, Hkv, D); Hkv divides H, query head h reads key
//          head h / (H / Hkv); 1 <= D <= 256; lse (B, H, T). Packed: (total, H, D), (total, Hkv, D), lse (H,
//          total), with cu_seqlens_q and cu_seqlens_k (documents + 1), int32, from 0 to the totals, not
//          decreasing. alibi_slopes (H) or (B, H); sinks (H); attn_mask and attn_bias broadcast to (B, H, T,
//          S), S their own, T too where dbias is wanted, and not packed. seed one element; prefix_lengths (B), or one
//          for each document, each 0 to its S. k_pages, v_pages (pages, page_size, Hkv, D); block_table (B, blocks),
//          of which what a sequence needs must name pages; cache_seqlens (B), each 0 to blocks page_size.
// Types    q, k, v and their like of one type, f32 or bf16, on CUDA also f16; attn_mask bool; attn_bias of that type or
//          f32; seed int64; prefix_lengths, block_table and cache_seqlens int32; the rest f32, dbias included.
// Strides  any, but the last dimension contiguous: views into a fused projection work, gradients included.
//          lse, dlse, dbias, sinks, dsinks and cache_seqlens contiguous.
// Aliasing outputs overlap neither each other nor inputs; they may interleave within one buffer.
// Sums     f32. bf16: P and dS are rounded to bf16 before their products where the processor multiplies bf16. f32 on
//          CUDA with fp32_precision() tf32: operands of the products are rounded to 11 significant bits.
// Bits     Equal for every thread count; each sequence depends on itself only. Forward: every row depends on
//          its own keys. dk and dv sum over query blocks in order, dq over key blocks in order, dbias over
//          sequences and heads in order. What is dropped depends on seed, offset and place alone, the place
//          in the batch included.
// Memory   scratch per thread: packed K and V of a sequence and head forward, Q, dout and dq backward: O((T +
//          S) D).
// Cost     forward 4 D flops and one exponential per visible (t, s); backward 10 D and one; with dropout an eighth
//          of a Philox call more, both ways. Blocks outside the mask are skipped; a pattern's hidden keys within
//          a visited step of 32 cost as much as visible ones.
// Device   On CUDA what lies in cu_seqlens, prefix_lengths, block_table, cache_seqlens and seed is read by the kernels:
//          nothing waits for the device, and lengths or pages that break the rules give results of no meaning, but touch
//          nothing beyond the tensors. seed may lie on the CPU as well, and is read there when the op is called. At most
//          2^29 tokens. Packed documents of few queries on the average have a kernel of their own: another sum's order.
// Errors   ValueError or TypeError on any violated line above, before anything is written.
#pragma once

#include "core/tensor_view.h"

namespace gptcore {

// What both passes are told beside their tensors. A new option is a line here, in the tuple of
// bindings/attention.cpp, in AttentionProblem, and in `_OPTIONS` of ops/attention.py.
struct AttentionOptions {
  float softmax_scale;
  bool causal;
  int64_t left, right;  // window; -1: unbounded
  float soft_cap;       // 0: none
  TensorView alibi_slopes;
  TensorView attn_mask;  // true where a query may see a key
  TensorView attn_bias;
  TensorView sinks;
  double dropout_p;           // 0 to 1; rounded to a multiple of 1/65536
  TensorView seed;            // None without dropout
  int64_t offset;             // 0 to 2^32 - 1
  TensorView prefix_lengths;  // None: no prefixes
  int64_t sparse_stride, sparse_summary;
};

// lse may be None. cu_seqlens_q and cu_seqlens_k are both given (packed) or both None.
void attention_forward(const TensorView& q, const TensorView& k, const TensorView& v,
                       const TensorView& cu_seqlens_q, const TensorView& cu_seqlens_k,
                       const AttentionOptions& options, const TensorView& out, const TensorView& lse);

// Over a cache in pages. Of the options only softmax_scale, causal, the window, soft_cap, alibi_slopes and sinks.
void attention_paged(const TensorView& q, const TensorView& k_pages, const TensorView& v_pages,
                     const TensorView& block_table, const TensorView& cache_seqlens,
                     const AttentionOptions& options, const TensorView& out, const TensorView& lse);

// Gradients, overwritten. dlse: that of lse. dbias and dsinks: those of attn_bias and sinks. Each may be None.
void attention_backward(const TensorView& dout, const TensorView& q, const TensorView& k, const TensorView& v,
                        const TensorView& out, const TensorView& lse, const TensorView& cu_seqlens_q,
                        const TensorView& cu_seqlens_k, const AttentionOptions& options, const TensorView& dq,
                        const TensorView& dk, const TensorView& dv, const TensorView& dlse,
                        const TensorView& dbias, const TensorView& dsinks);

}  // namespace gptcore
