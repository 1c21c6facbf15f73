#include "kernels/grad_norm/grad_norm.h"

#include <cmath>
#include <memory>

#include "core/isa.h"
#include "core/tensor_lists.h"
#include "kernels/grad_norm/grad_norm_body.h"

namespace gptcore {

GPTCORE_BODIES(GradNormBodies, grad_norm_bodies)

std::pair<double, bool> grad_norm(const std::vector<TensorView>& grads, double grad_scale, const char* op) {
  const Checker check(op);
  check.number(grad_scale > 0 && std::isfinite(grad_scale), "grad_scale", grad_scale,
               "a finite number above 0");
  std::vector<GradNormTensor> tensors(grads.size());
  for (size_t i = 0; i < grads.size(); ++i) {
    check.item(grads, "grads", i, grads[i], {DType::f32, DType::bf16}, false);
    tensors[i] = {grads[i].data, grads[i].dtype == DType::bf16};
  }
  const std::vector<Chunk> chunks = chunks_of(grads);
  const int64_t count = static_cast<int64_t>(chunks.size());
  std::vector<double> sums(chunks.size());
  const std::unique_ptr<bool[]> finite(new bool[chunks.size()]);
  grad_norm_bodies_table.pick().square_sums(tensors.data(), chunks.data(), count, sums.data(), finite.get());
  double total = 0;
  bool found_inf = false;
  for (int64_t i = 0; i < count; ++i) {
    total += sums[i];
    found_inf = found_inf || !finite[i];
  }
  return {std::sqrt(total) / grad_scale, found_inf};
}

}  // namespace gptcore
