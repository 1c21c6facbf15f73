// Lists of tensors, as an optimizer hands them over: checked against the parameters, and cut into pieces.
#pragma once

#include <vector>

#include "core/check.h"
#include "core/chunks.h"

namespace gptcore {

// 64 KiB of f32 per array: large beside the cost of a task, small enough that the last tasks end together.
constexpr int64_t kChunkElements = 16384;

inline std::vector<Chunk> chunks_of(const std::vector<TensorView>& tensors) {
  std::vector<Chunk> chunks;
  for (size_t i = 0; i < tensors.size(); ++i) {
    const int64_t size = tensors[i].numel();
    for (int64_t begin = 0; begin < size; begin += kChunkElements) {
      const int64_t rest = size - begin;
      chunks.push_back({static_cast<int64_t>(i), begin, rest < kChunkElements ? rest : kChunkElements});
    }
  }
  return chunks;
}

// Checks a list that is written and puts its pointers into `field` of `tensors`.
template <class Tensor, class T>
void take_list(const Checker& check, const std::vector<TensorView>& list, const char* name,
               const std::vector<TensorView>& params, T* Tensor::* field, std::vector<Tensor>* tensors) {
  check.length(list.size(), name, params.size());
  for (size_t i = 0; i < list.size(); ++i) {
    check.item(list, name, i, params[i], {dtype_of<T>()}, true);
    (*tensors)[i].*field = list[i].as<T>();
  }
}

// The same for gradients, which are f32 or bf16, each its own, and for the numbers that weigh the parameters.
template <class Tensor>
void take_gradients(const Checker& check, const std::vector<TensorView>& grads,
                    const std::vector<TensorView>& params, const std::vector<double>& weight_decay,
                    std::vector<Tensor>* tensors) {
  check.length(grads.size(), "grads", params.size());
  check.length(weight_decay.size(), "weight_decay", params.size());
  for (size_t i = 0; i < grads.size(); ++i) {
    check.item(grads, "grads", i, params[i], {DType::f32, DType::bf16}, false);
    (*tensors)[i].grad = grads[i].data;
    (*tensors)[i].bf16_grad = grads[i].dtype == DType::bf16;
    if (!(weight_decay[i] >= 0)) {
      check.fail(("weight_decay[" + std::to_string(i) + "]").c_str(), std::to_string(weight_decay[i]),
                 "a number, 0 or more");
    }
  }
}

}  // namespace gptcore
