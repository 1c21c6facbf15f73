#include "core/parallel.h"
#include "core/simd.h"
#include "kernels/grad_norm/grad_norm_body.h"

namespace gptcore {
namespace GPTCORE_ISA_NS {
namespace {

GPTCORE_INLINE double as_double(float x) { return x; }
GPTCORE_INLINE double as_double(bf16 x) { return widen(x); }

template <class T>
double slow_square_sum(const T* grad, int64_t size) {
  double sum = 0;
  for (int64_t i = 0; i < size; ++i) {
    const double g = as_double(grad[i]);
    sum += g * g;
  }
  return sum;
}

// Sum of squares of one chunk, in four running f32 vectors (two adds start per cycle, each takes four), and
// the largest magnitude as an integer, which tells infinities and NaN from finite numbers without a branch.
template <class T>
double square_sum(const T* grad, int64_t size, bool* finite) {
  Vec sums[4] = {};
  VecI largest[4] = {};
  const auto take = [&](int64_t i, int64_t n, int s) {
    const Vec g = load_some(grad + i, n);
    const VecI magnitude = (VecI)abs(g);
    sums[s] += g * g;
    largest[s] = magnitude > largest[s] ? magnitude : largest[s];
  };
  int64_t i = 0;
  for (; i + 4 * kLanes <= size; i += 4 * kLanes) {
    for (int s = 0; s < 4; ++s) take(i + s * kLanes, kLanes, s);
  }
  for (; i + kLanes <= size; i += kLanes) take(i, kLanes, 0);
  if (i < size) take(i, size - i, 1);
  int32_t top = 0;
  for (int s = 0; s < 4; ++s) {
    for (int lane = 0; lane < kLanes; ++lane) top = largest[s][lane] > top ? largest[s][lane] : top;
  }
  const float sum = reduce_add((sums[0] + sums[1]) + (sums[2] + sums[3]));
  *finite = top < 0x7f800000;
  // Below 1e-19 squares lose bits to the denormal range, above 1e19 they overflow. All-zero gradients are
  // common.
  const bool in_range = sum > 1e-30f && sum < 1e38f;
  return in_range || !*finite || top == 0 ? sum : slow_square_sum(grad, size);
}

void square_sums(const GradNormTensor* tensors, const Chunk* chunks, int64_t count, double* sums,
                 bool* finite) {
  parallel_for(count, [&](int64_t i, int) {
    const Chunk& chunk = chunks[i];
    const GradNormTensor& tensor = tensors[chunk.tensor];
    sums[i] = tensor.bf16
                  ? square_sum(static_cast<const bf16*>(tensor.data) + chunk.begin, chunk.size, finite + i)
                  : square_sum(static_cast<const float*>(tensor.data) + chunk.begin, chunk.size, finite + i);
  });
}

}  // namespace

extern const GradNormBodies grad_norm_bodies;
const GradNormBodies grad_norm_bodies = {square_sums};

}  // namespace GPTCORE_ISA_NS
}  // namespace gptcore
