#include "kernels/attention/attention.h"

#include "cases.h"

namespace gptcore::cases {
namespace {

AttentionOptions causal() {
  AttentionOptions options{};
  options.softmax_scale = 0.2f, options.causal = true, options.left = options.right = -1;
  return options;
}

Outputs batched(DType dtype) {
  const std::vector<int64_t> queries{2, 150, 4, 40}, keys{2, 150, 2, 40};
  const Tensor q = uniform(dtype, queries, 1), k = uniform(dtype, keys, 2), v = uniform(dtype, keys, 3),
               dout = uniform(dtype, queries, 4);
  const Tensor out(dtype, queries), lse(DType::f32, {2, 4, 150}), dq(dtype, queries), dk(dtype, keys),
      dv(dtype, keys);
  attention_forward(q, k, v, {}, {}, causal(), out, lse);
  attention_backward(dout, q, k, v, out, lse, {}, {}, causal(), dq, dk, dv, {}, {}, {});
  return {out, lse, dq, dk, dv};
}

// One sequence and head, whose blocks are shared out.
Outputs one_long_head(DType dtype) {
  const std::vector<int64_t> sizes{1, 700, 1, 64};
  const Tensor q = uniform(dtype, sizes, 1), k = uniform(dtype, sizes, 2), v = uniform(dtype, sizes, 3),
               dout = uniform(dtype, sizes, 4);
  const Tensor out(dtype, sizes), lse(DType::f32, {1, 1, 700}), dq(dtype, sizes), dk(dtype, sizes),
      dv(dtype, sizes);
  attention_forward(q, k, v, {}, {}, causal(), out, lse);
  attention_backward(dout, q, k, v, out, lse, {}, {}, causal(), dq, dk, dv, {}, {}, {});
  return {out, lse, dq, dk, dv};
}

Outputs documents(DType dtype) {
  const std::vector<int64_t> sizes{300, 3, 32};
  const Tensor q = uniform(dtype, sizes, 1), k = uniform(dtype, sizes, 2), v = uniform(dtype, sizes, 3),
               dout = uniform(dtype, sizes, 4), ends(DType::i32, {5});
  const int32_t at[5] = {0, 70, 70, 201, 300};
  std::memcpy(ends.view().data, at, sizeof(at));
  const Tensor out(dtype, sizes), lse(DType::f32, {3, 300}), dq(dtype, sizes), dk(dtype, sizes),
      dv(dtype, sizes);
  attention_forward(q, k, v, ends, ends, causal(), out, lse);
  attention_backward(dout, q, k, v, out, lse, ends, ends, causal(), dq, dk, dv, {}, {}, {});
  return {out, lse, dq, dk, dv};
}

// Most of what may be done to scores, with the gradients of bias and sinks, summed over sequences and heads.
Outputs changed_scores(DType dtype) {
  const std::vector<int64_t> queries{2, 150, 4, 40}, keys{2, 150, 2, 40};
  const Tensor q = uniform(dtype, queries, 1), k = uniform(dtype, keys, 2), v = uniform(dtype, keys, 3),
               dout = uniform(dtype, queries, 4), slopes = uniform(DType::f32, {4}, 5),
               bias = uniform(DType::f32, {1, 1, 150, 150}, 6), sinks = uniform(DType::f32, {4}, 7),
               dlse = uniform(DType::f32, {2, 4, 150}, 8);
  AttentionOptions options = causal();
  const Tensor seed = indices(DType::i64, {1}, 1000, 9);
  options.soft_cap = 5.0f;
  options.dropout_p = 0.1, options.seed = seed;
  options.alibi_slopes = slopes, options.attn_bias = bias, options.sinks = sinks;
  const Tensor out(dtype, queries), lse(DType::f32, {2, 4, 150}), dq(dtype, queries), dk(dtype, keys),
      dv(dtype, keys), dbias(DType::f32, {1, 1, 150, 150}), dsinks(DType::f32, {4});
  attention_forward(q, k, v, {}, {}, options, out, lse);
  attention_backward(dout, q, k, v, out, lse, {}, {}, options, dq, dk, dv, dlse, dbias, dsinks);
  return {out, lse, dq, dk, dv, dbias, dsinks};
}

Outputs decoding(DType dtype) {
  const Tensor q = uniform(dtype, {4, 1, 8, 64}, 1), k = uniform(dtype, {4, 1000, 2, 64}, 2),
               v = uniform(dtype, {4, 1000, 2, 64}, 3);
  const Tensor out(dtype, {4, 1, 8, 64});
  attention_forward(q, k, v, {}, {}, causal(), out, {});
  return {out};
}

const ForBothTypes batched_cases("attention batched", batched);
const ForBothTypes long_cases("attention one long head", one_long_head);
const ForBothTypes document_cases("attention documents", documents);
const ForBothTypes score_cases("attention changed scores", changed_scores);
const ForBothTypes decoding_cases("attention decoding", decoding);

}  // namespace
}  // namespace gptcore::cases
