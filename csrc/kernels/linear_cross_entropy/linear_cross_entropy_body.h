// What linear_cross_entropy.cpp hands to the per-ISA bodies, already checked. Ignored rows are left out: n
// counts the kept ones, and arrays by row hold them in order, padded with zeros (targets with -1) to a
// multiple of kRowPadding.
#pragma once

#include <cstdint>

#include "core/dtype.h"
#include "core/parallel.h"

namespace gptcore {

constexpr int64_t kRowPadding = 32;

// Tokens whose logits are kept at a time: so many that passing over weight and dweight again for each chunk
// is a twentieth of its products. torch keeps three matrices of the logits of all.
constexpr int64_t kMostTokens = 512;

// Floats from one group of 16 words of kept logits to the next. 512 bytes more than the tiles take: a stride
// of some KiB would put the tiles of many words into the same few sets of L1.
constexpr int64_t kept_stride(int64_t padded_tokens) { return 16 * padded_tokens + 128; }

struct LinearCrossEntropyInputs {
  const void *x, *weight;
  DType x_dtype, weight_dtype;
  int64_t x_stride, weight_stride;
  const int32_t* rows;     // where a kept row lies in x and dx
  const int32_t* targets;  // its class
  int64_t n, c, v;
  float scale, soft_cap;  // products to logits; no cap: 0
  const float *bias,
      *class_weight;  // by word, bias scaled; null: none, weights also where nothing is smoothed
  bool modified;      // more than a scale lies between them: modify() makes logits where the products are
  float scale_left;   // of logits thereafter: 1 where modified, else scale
  // Room for this call's logits (unscaled unless modified), written by forward and turned into gradients by
  // backward, f32 in place (null: backward makes the logits again). f32 tiles of 16 words x 16 tokens, [group
  // of words][group of tokens], both padded to kRowPadding, groups of words kept_stride() apart. To the
  // product that gives dweight they are packed A by rows, to that which gives dx by columns.
  float* logits;
  bool parallel;  // worth more than one thread
};

// Tasks over threads, or in order on this one where the whole call takes less than waking a thread.
template <class F>
inline void for_tasks(const LinearCrossEntropyInputs& a, int64_t tasks, const F& body) {
  if (a.parallel) {
    parallel_for(tasks, body);
  } else {
    for (int64_t task = 0; task < tasks; ++task) body(task, 0);
  }
}

struct LinearCrossEntropyForward : LinearCrossEntropyInputs {
  float *lse, *target_logit;
  float* logit_sum;  // times class weights; null: not wanted
  float* entropy;    // null: neither this nor predicted is wanted
  int32_t* predicted;
};

// The gradient of the products: softmax_factor * p - uniform * (class_weight or 1) - (target_share at the
// target), times the slope of the soft cap.
struct LinearCrossEntropyBackward : LinearCrossEntropyInputs {
  const float *lse, *softmax_factor, *target_share, *uniform;
  void* dx;  // x's type; null: not wanted
  int64_t dx_stride;
  void* dweight;  // null: not wanted
  int64_t dweight_stride;
  DType dweight_dtype;
  float* dbias;     // added to; null: not wanted
  bool accumulate;  // dweight is added to
  bool resume;      // dweight (f32) holds the sums over earlier tokens, which go on
};

struct LinearCrossEntropyBodies {
  void (*forward)(const LinearCrossEntropyForward&);
  void (*backward)(const LinearCrossEntropyBackward&);
};

}  // namespace gptcore
