#include "core/parallel.h"
#include "core/simd.h"
#include "kernels/adamw/adamw_body.h"

namespace gptcore {
namespace GPTCORE_ISA_NS {
namespace {

using Update = void (*)(const AdamwTensor& tensor, const Chunk& chunk, const AdamwNumbers& a);

template <class T, bool with_copy, bool l2, bool amsgrad>
void update_chunk(const AdamwTensor& tensor, const Chunk& chunk, const AdamwNumbers& a) {
  const T* grad = static_cast<const T*>(tensor.grad) + chunk.begin;
  float* param = tensor.param + chunk.begin;
  float* exp_avg = tensor.exp_avg + chunk.begin;
  float* exp_avg_sq = tensor.exp_avg_sq + chunk.begin;
  float* max_exp_avg_sq = amsgrad ? tensor.max_exp_avg_sq + chunk.begin : nullptr;
  bf16* copy = with_copy ? tensor.copy + chunk.begin : nullptr;
  for_lanes(chunk.size, [&](int64_t i, int64_t n) {
    Vec g = load_some(grad + i, n) * a.grad_factor;
    if constexpr (l2) g += load_some(param + i, n) * tensor.l2;
    Vec m = load_some(exp_avg + i, n);
    m += (g - m) * a.rest1;
    const Vec v = load_some(exp_avg_sq + i, n) * a.beta2 + g * g * a.rest2;
    Vec w = v;
    if constexpr (amsgrad) {
      w = max(load_some(max_exp_avg_sq + i, n), v);
      store_some(max_exp_avg_sq + i, w, n);
    }
    const Vec p =
        load_some(param + i, n) * tensor.keep - (m * a.step_size) / (sqrt(w) * a.root_factor + a.eps);
    store_some(exp_avg + i, m, n);
    store_some(exp_avg_sq + i, v, n);
    store_some(param + i, p, n);
    if constexpr (with_copy) store_some(copy + i, p, n);
  });
}

// A body for each combination that moves other bytes, so that plain AdamW pays nothing for the rest.
template <class T, bool with_copy>
Update update_of(const AdamwTensor& tensor) {
  const bool l2 = tensor.l2 != 0;
  if (tensor.max_exp_avg_sq) {
    return l2 ? update_chunk<T, with_copy, true, true> : update_chunk<T, with_copy, false, true>;
  }
  return l2 ? update_chunk<T, with_copy, true, false> : update_chunk<T, with_copy, false, false>;
}

template <class T>
Update update_of(const AdamwTensor& tensor) {
  return tensor.copy ? update_of<T, true>(tensor) : update_of<T, false>(tensor);
}

void update(const AdamwTensor* tensors, const Chunk* chunks, int64_t count, const AdamwNumbers& numbers) {
  parallel_for(count, [&](int64_t i, int) {
    const Chunk& chunk = chunks[i];
    const AdamwTensor& tensor = tensors[chunk.tensor];
    const Update body = tensor.bf16_grad ? update_of<bf16>(tensor) : update_of<float>(tensor);
    body(tensor, chunk, numbers);
  });
}

}  // namespace

extern const AdamwBodies adamw_bodies;
const AdamwBodies adamw_bodies = {update};

}  // namespace GPTCORE_ISA_NS
}  // namespace gptcore
