#include "kernels/moe_dispatch/moe_dispatch.h"

#include "cases.h"

namespace gptcore::cases {
namespace {

// 900 tokens to two places each, of which every seventh is dropped.
Outputs there_and_back(DType dtype) {
  const int64_t tokens = 900, choices = 2, width = 200;
  const Tensor rows(DType::i32, {tokens, choices}), offsets(DType::i32, {2});
  int32_t used = 0;
  for (int32_t i = 0; i < tokens * choices; ++i) rows.view().as<int32_t>()[i] = i % 7 == 0 ? -1 : used++;
  offsets.view().as<int32_t>()[1] = used;
  const Tensor x = uniform(dtype, {tokens, width}, 1), gates = uniform(DType::f32, {tokens, choices}, 2);
  const Tensor sorted(dtype, {tokens * choices, width}), out(dtype, {tokens, width}),
      dsorted(dtype, {tokens * choices, width}), dgates(DType::f32, {tokens, choices});
  moe_dispatch_forward(x, rows, offsets, sorted);
  moe_combine_forward(sorted, rows, gates, offsets, out);
  moe_combine_backward(x, sorted, rows, gates, offsets, dsorted, dgates);
  return {sorted, out, dsorted, dgates};
}

const ForBothTypes both_ways("moe_dispatch", there_and_back);

}  // namespace
}  // namespace gptcore::cases
