// Attention of few queries over keys that lie one after the other.
#include "kernels/attention/attention_decode.cuh"

namespace gptcore::cuda {

bool attention_decode_takes(const AttentionProblem& p) { return decode_takes(p); }

template <class T>
void attention_decode(const AttentionProblem& p) {
  decode<T, false>(p);
}

template void attention_decode<float>(const AttentionProblem& p);
template void attention_decode<bf16>(const AttentionProblem& p);
template void attention_decode<f16>(const AttentionProblem& p);

}  // namespace gptcore::cuda
