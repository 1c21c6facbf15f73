// The launchers of attention on CUDA, and which takes what. T is float, tf32 (attention_operands.cuh), bf16 or f16.
//
//   attention_forward_mma.cu, attention_backward_mma.cu    mma.sync, from sm_80 on: every option
//   attention_forward_sm90.cu, attention_backward_sm90.cu  wgmma and the bulk copy engine, for sm_90 alone
//   attention_decode.cu                                    few queries over many keys, keys split over blocks
//   attention_paged.cu                                     the same over keys in pages, any number of queries
//
// attention.cu asks the special ones first; each says by _takes() whether a problem is its kind.
#pragma once

#include "kernels/attention/attention_body.h"

namespace gptcore::cuda {

struct tf32;

template <class T>
void attention_forward_mma(const AttentionProblem& p);
template <class T>
void attention_backward_mma(const AttentionProblem& p);

template <class T>
bool attention_forward_sm90_takes(const AttentionProblem& p);
template <class T>
void attention_forward_sm90(const AttentionProblem& p);

template <class T>
bool attention_backward_sm90_takes(const AttentionProblem& p);
template <class T>
void attention_backward_sm90(const AttentionProblem& p);

bool attention_decode_takes(const AttentionProblem& p);
template <class T>
void attention_decode(const AttentionProblem& p);

template <class T>
void attention_paged(const AttentionProblem& p);

}  // namespace gptcore::cuda
