// What moe_router.cpp asks of its arguments.
#pragma once

#include <cstdint>
#include <initializer_list>

#include "core/check.h"
#include "core/tensor_view.h"

namespace gptcore {

struct RouterSizes {
  int64_t tokens, experts, choices;
};

RouterSizes check_router_inputs(const Checker& check, const TensorView& logits, const TensorView& experts);

void check_router_table(const Checker& check, const TensorView& tensor, const char* name, DType type,
                        std::initializer_list<int64_t> shape);

void check_router_choice(const Checker& check, const RouterSizes& sizes, const TensorView& priority,
                         const TensorView& uniforms, bool by_gate, double second_threshold, int64_t capacity);

// Every choice is an expert, or all of a token's are -1; returns how many tokens chose.
int64_t check_router_chosen(const Checker& check, const RouterSizes& sizes, const int32_t* chosen);

}  // namespace gptcore
