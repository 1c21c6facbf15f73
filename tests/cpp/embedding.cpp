#include "kernels/embedding/embedding.h"

#include "cases.h"

namespace gptcore::cases {
namespace {

// 3000 tokens of 700 words, one of them a third of all: its rows are summed apart.
Outputs gathered(DType dtype, int64_t width) {
  const int64_t tokens = 3000, words = 700;
  const Tensor ids = indices(DType::i64, {tokens}, static_cast<uint32_t>(words), 1);
  for (int64_t n = 0; n < tokens; n += 3) ids.view().as<int64_t>()[n] = 5;
  const Tensor weight = uniform(dtype, {words, width}, 2), grad = uniform(dtype, {tokens, width}, 3);
  const Tensor out(dtype, {tokens, width}), dweight(dtype, {words, width}),
      sum = uniform(DType::f32, {words, width}, 4);
  embedding_forward(ids, weight, out);
  embedding_backward(ids, grad, dweight, false);
  embedding_backward(ids, grad, sum, true);
  return {out, dweight, sum};
}

const ForBothTypes wide("embedding wide", [](DType dtype) { return gathered(dtype, 130); });
const ForBothTypes narrow("embedding narrow", [](DType dtype) { return gathered(dtype, 24); });

}  // namespace
}  // namespace gptcore::cases
