#include "kernels/rotary/rotary.h"

#include "cases.h"

namespace gptcore::cases {
namespace {

Outputs turned(DType dtype, bool interleaved) {
  const std::vector<int64_t> sizes{2, 250, 4, 66};
  const Tensor x = uniform(dtype, sizes, 1), cos = uniform(DType::f32, {250, 24}, 2),
               sin = uniform(DType::f32, {250, 24}, 3), positions = indices(DType::i32, {2, 250}, 250, 4);
  const Tensor out(dtype, sizes);
  rotary(x, cos, sin, positions, 0, interleaved, false, out);
  return {out};
}

const ForBothTypes halves("rotary halves", [](DType dtype) { return turned(dtype, false); });
const ForBothTypes interleaved("rotary interleaved", [](DType dtype) { return turned(dtype, true); });

}  // namespace
}  // namespace gptcore::cases
