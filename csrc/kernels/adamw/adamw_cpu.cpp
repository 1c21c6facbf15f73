#include "core/parallel.h"
#include "core/prefetch.h"
#include "core/simd.h"
#include "kernels/adamw/adamw_body.h"

namespace gptcore {
namespace GPTCORE_ISA_NS {
namespace {

// --- split parameters: bits = (weight << 16) + low ---------------------------------------------------------

GPTCORE_INLINE VecH load_half(const void* p, int64_t n) {
  if (n == kLanes) return (VecH) * static_cast<const VecHUnaligned*>(p);
  VecH x = {};
  __builtin_memcpy(&x, p, static_cast<size_t>(n) * 2);
  return x;
}

GPTCORE_INLINE void store_half(void* p, VecU x, int64_t n) {
  const VecH half = __builtin_convertvector(x, VecH);
  if (n == kLanes) {
    *static_cast<VecHUnaligned*>(p) = half;
  } else {
    __builtin_memcpy(p, &half, static_cast<size_t>(n) * 2);
  }
}

GPTCORE_INLINE Vec join(VecH weight, VecH low) {
  const VecU upper = zero_extend(weight) << 16;
  const VecI rest = (VecI)(zero_extend(low) << 16) >> 16;
  // A weight of zero that somebody wrote over another one: below it lie only NaNs.
  const VecI below_zero = ((VecI)(upper << 1) == 0) & (rest < 0);
  return (Vec)(upper + (VecU)(below_zero ? VecI{} : rest));
}

GPTCORE_INLINE void split(Vec x, bf16* weight, int16_t* low, int64_t n) {
  const VecU bits = (VecU)x;
  const VecI whole = x == x;
  store_half(weight, (VecU)(whole ? (VecI)((bits + 0x8000u) >> 16) : (VecI)((bits >> 16) | 0x40u)), n);
  store_half(low, (VecU)(whole & (VecI)bits), n);  // modulo 2^16 the difference is the lower half itself
}

// --- update ------------------------------------------------------------------------------------------------

enum class Form { f32, with_copy, split };

constexpr int64_t kAhead = 1024;  // bytes; 512 to 2048 are the same

using Update = void (*)(const AdamwTensor& tensor, const Chunk& chunk, const AdamwNumbers& a);

template <class T, Form form, bool l2, bool amsgrad>
void update_chunk(const AdamwTensor& tensor, const Chunk& chunk, const AdamwNumbers& a) {
  const T* grad = static_cast<const T*>(tensor.grad) + chunk.begin;
  float* param = form == Form::split ? nullptr : tensor.param + chunk.begin;
  bf16* weight = form == Form::split ? tensor.weight + chunk.begin : nullptr;
  int16_t* low = form == Form::split ? tensor.low + chunk.begin : nullptr;
  float* exp_avg = tensor.exp_avg + chunk.begin;
  float* exp_avg_sq = tensor.exp_avg_sq + chunk.begin;
  float* max_exp_avg_sq = amsgrad ? tensor.max_exp_avg_sq + chunk.begin : nullptr;
  bf16* copy = form == Form::with_copy ? tensor.copy + chunk.begin : nullptr;
  for_lanes(chunk.size, [&](int64_t i, int64_t n) {
    fetch_ahead<kAhead>(grad + i), fetch_ahead<kAhead>(exp_avg + i), fetch_ahead<kAhead>(exp_avg_sq + i);
    if constexpr (amsgrad) fetch_ahead<kAhead>(max_exp_avg_sq + i);
    Vec before;
    if constexpr (form == Form::split) {
      fetch_ahead<kAhead>(weight + i), fetch_ahead<kAhead>(low + i);
      before = join(load_half(weight + i, n), load_half(low + i, n));
    } else {
      fetch_ahead<kAhead>(param + i);
      before = load_some(param + i, n);
    }
    Vec g = load_some(grad + i, n) * a.grad_factor;
    if constexpr (l2) g += before * tensor.l2;
    Vec m = load_some(exp_avg + i, n);
    m += (g - m) * a.rest1;
    const Vec v = load_some(exp_avg_sq + i, n) * a.beta2 + g * g * a.rest2;
    Vec w = v;
    if constexpr (amsgrad) {
      w = max(load_some(max_exp_avg_sq + i, n), v);
      store_some(max_exp_avg_sq + i, w, n);
    }
    const Vec p = before * tensor.keep - (m * a.step_size) / (sqrt(w) * a.root_factor + a.eps);
    store_some(exp_avg + i, m, n);
    store_some(exp_avg_sq + i, v, n);
    if constexpr (form == Form::split) {
      split(p, weight + i, low + i, n);
    } else {
      store_some(param + i, p, n);
    }
    if constexpr (form == Form::with_copy) store_some(copy + i, p, n);
  });
}

// A body for each combination that moves other bytes, so that plain AdamW pays nothing for the rest.
template <class T, Form form>
Update update_of(const AdamwTensor& tensor) {
  const bool l2 = tensor.l2 != 0;
  if (tensor.max_exp_avg_sq) {
    return l2 ? update_chunk<T, form, true, true> : update_chunk<T, form, false, true>;
  }
  return l2 ? update_chunk<T, form, true, false> : update_chunk<T, form, false, false>;
}

template <class T>
Update update_of(const AdamwTensor& tensor) {
  if (tensor.low) return update_of<T, Form::split>(tensor);
  return tensor.copy ? update_of<T, Form::with_copy>(tensor) : update_of<T, Form::f32>(tensor);
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
const AdamwBodies adamw_bodies = {update, nullptr};

}  // namespace GPTCORE_ISA_NS
}  // namespace gptcore
