#include "core/parallel.h"
#include "core/prefetch.h"
#include "core/simd.h"
#include "kernels/sgd/sgd_body.h"

namespace gptcore {
namespace GPTCORE_ISA_NS {
namespace {

enum class Momentum { none, classical, nesterov };

constexpr int64_t kAhead = 1024;  // bytes

template <class T, bool with_copy, Momentum momentum, bool l2>
void update_chunk(const SgdTensor& tensor, const Chunk& chunk, const SgdNumbers& a) {
  const T* grad = static_cast<const T*>(tensor.grad) + chunk.begin;
  float* param = tensor.param + chunk.begin;
  float* buffer = momentum == Momentum::none ? nullptr : tensor.buffer + chunk.begin;
  bf16* copy = with_copy ? tensor.copy + chunk.begin : nullptr;
  for_lanes(chunk.size, [&](int64_t i, int64_t n) {
    fetch_ahead<kAhead>(param + i), fetch_ahead<kAhead>(grad + i);
    if constexpr (momentum != Momentum::none) fetch_ahead<kAhead>(buffer + i);
    const Vec p = load_some(param + i, n);
    Vec g = load_some(grad + i, n) * a.grad_factor;
    if constexpr (l2) g += p * tensor.l2;
    Vec u = g;
    if constexpr (momentum != Momentum::none) {
      Vec b = {};
      if (!tensor.first) b = load_some(buffer + i, n);
      b = b * tensor.keep + g * tensor.share;
      store_some(buffer + i, b, n);
      u = momentum == Momentum::nesterov ? g + b * a.momentum : b;
    }
    const Vec moved = p - u * a.lr;
    store_some(param + i, moved, n);
    if constexpr (with_copy) store_some(copy + i, moved, n);
  });
}

template <class T, bool with_copy, Momentum momentum>
void update_chunk(const SgdTensor& tensor, const Chunk& chunk, const SgdNumbers& a) {
  tensor.l2 != 0 ? update_chunk<T, with_copy, momentum, true>(tensor, chunk, a)
                 : update_chunk<T, with_copy, momentum, false>(tensor, chunk, a);
}

template <class T, bool with_copy>
void update_chunk(const SgdTensor& tensor, const Chunk& chunk, const SgdNumbers& a) {
  if (!tensor.buffer) {
    update_chunk<T, with_copy, Momentum::none>(tensor, chunk, a);
  } else if (a.nesterov) {
    update_chunk<T, with_copy, Momentum::nesterov>(tensor, chunk, a);
  } else {
    update_chunk<T, with_copy, Momentum::classical>(tensor, chunk, a);
  }
}

template <class T>
void update_chunk(const SgdTensor& tensor, const Chunk& chunk, const SgdNumbers& a) {
  tensor.copy ? update_chunk<T, true>(tensor, chunk, a) : update_chunk<T, false>(tensor, chunk, a);
}

void update(const SgdTensor* tensors, const Chunk* chunks, int64_t count, const SgdNumbers& numbers) {
  parallel_for(count, [&](int64_t i, int) {
    const Chunk& chunk = chunks[i];
    const SgdTensor& tensor = tensors[chunk.tensor];
    tensor.bf16_grad ? update_chunk<bf16>(tensor, chunk, numbers)
                     : update_chunk<float>(tensor, chunk, numbers);
  });
}

}  // namespace

extern const SgdBodies sgd_bodies;
const SgdBodies sgd_bodies = {update, nullptr};

}  // namespace GPTCORE_ISA_NS
}  // namespace gptcore
