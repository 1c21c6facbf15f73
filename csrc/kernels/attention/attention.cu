// Attention's bodies on CUDA: which kernel takes a problem.
#include "core/cuda/bodies.h"
#include "kernels/attention/attention_cuda.h"

namespace gptcore::cuda {
namespace {

// Whether the kernels of few queries have done it: they wait for memory, whatever their products.
template <class T>
bool decoded(const AttentionProblem& p) {
  if (p.pages.table) {
    attention_paged<T>(p);
  } else if (attention_decode_takes(p)) {
    attention_decode<T>(p);
  } else {
    return false;
  }
  return true;
}

template <class T>
void forward(const AttentionProblem& p) {
  if (decoded<T>(p)) return;
  if constexpr (sizeof(T) == 2) {
    if (attention_forward_sm90_takes<T>(p)) return attention_forward_sm90<T>(p);
  }
  attention_forward_mma<T>(p);
}

template <class T>
void backward(const AttentionProblem& p) {
  if constexpr (sizeof(T) == 2) {
    if (attention_backward_sm90_takes<T>(p)) return attention_backward_sm90<T>(p);
  }
  attention_backward_mma<T>(p);
}

void forward_tf32(const AttentionProblem& p) {
  if (!decoded<float>(p)) attention_forward_mma<tf32>(p);
}

}  // namespace

GPTCORE_CUDA_BODIES(AttentionBodies, attention_f32_bodies) = {forward<float>, backward<float>};
GPTCORE_CUDA_BODIES(AttentionBodies, attention_tf32_bodies) = {forward_tf32, attention_backward_mma<tf32>};
GPTCORE_CUDA_BODIES(AttentionBodies, attention_bf16_bodies) = {forward<bf16>, backward<bf16>};
GPTCORE_CUDA_BODIES(AttentionBodies, attention_f16_bodies) = {forward<f16>, backward<f16>};

}  // namespace gptcore::cuda
