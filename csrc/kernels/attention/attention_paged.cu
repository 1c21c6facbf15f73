// Attention over keys in pages. Many queries of a sequence, as a chunk of a prompt has, are more rows of the same kernel.
#include "kernels/attention/attention_decode.cuh"

namespace gptcore::cuda {

template <class T>
void attention_paged(const AttentionProblem& p) {
  decode<T, true>(p);
}

template void attention_paged<float>(const AttentionProblem& p);
template void attention_paged<bf16>(const AttentionProblem& p);
template void attention_paged<f16>(const AttentionProblem& p);

}  // namespace gptcore::cuda
