#include "kernels/moe_router/moe_router_checks.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <string>

#include "core/rows.h"
#include "kernels/moe_router/moe_router_body.h"

namespace gptcore {
namespace {

constexpr int64_t kMostExperts = 4096;

}  // namespace

RouterSizes check_router_inputs(const Checker& check, const TensorView& logits, const TensorView& experts) {
  check.input(logits, "logits", {DType::f32, DType::bf16});
  check.ndim(logits, "logits", 2);
  check.last_contiguous(logits, "logits");
  RouterSizes sizes{logits.size(0), logits.size(1), 0};
  if (sizes.experts < 1 || sizes.experts > kMostExperts) {
    check.fail("logits", std::to_string(sizes.experts) + " experts", "1 to " + std::to_string(kMostExperts));
  }
  check.input(experts, "experts", {DType::i32});
  check.ndim(experts, "experts", 2);
  check.shape(experts, "experts", {sizes.tokens, -1});
  sizes.choices = experts.size(1);
  const int64_t most = std::min(kMostChoices, sizes.experts);
  if (sizes.choices < 1 || sizes.choices > most) {
    check.fail("top_k", std::to_string(sizes.choices) + " of " + std::to_string(sizes.experts) + " experts",
               "1 to " + std::to_string(most));
  }
  if (sizes.tokens * sizes.choices > std::numeric_limits<int32_t>::max()) {
    check.fail("logits", describe(logits), "fewer than 2^31 choices");
  }
  return sizes;
}

void check_router_table(const Checker& check, const TensorView& tensor, const char* name, DType type,
                        std::initializer_list<int64_t> shape) {
  check.input(tensor, name, {type});
  check.shape(tensor, name, shape);
  check.contiguous(tensor, name);
}

int64_t check_router_chosen(const Checker& check, const RouterSizes& sizes, const int32_t* chosen) {
  int32_t least = 0, most = 0;  // without padding that is all there is to see, in a tenth of the time
  for (int64_t i = 0; i < sizes.tokens * sizes.choices; ++i) {
    least = chosen[i] < least ? chosen[i] : least;
    most = chosen[i] > most ? chosen[i] : most;
  }
  if (least == 0 && most < sizes.experts) return sizes.tokens;
  int64_t counted = 0;
  for (int64_t n = 0; n < sizes.tokens; ++n) {
    const int32_t* row = chosen + n * sizes.choices;
    const bool padding = row[0] < 0;
    for (int64_t k = 0; k < sizes.choices; ++k) {
      if (padding ? row[k] == -1 : row[k] >= 0 && row[k] < sizes.experts) continue;
      check.fail("experts", std::to_string(row[k]) + " for token " + std::to_string(n),
                 "0 to " + std::to_string(sizes.experts - 1) + ", or -1 for all choices of a token");
    }
    counted += !padding;
  }
  return counted;
}

void check_router_choice(const Checker& check, const RouterSizes& sizes, const TensorView& priority,
                         const TensorView& uniforms, bool by_gate, double second_threshold,
                         int64_t capacity) {
  if (priority) check_vector(check, priority, "priority", sizes.tokens, {DType::f32});
  if (priority && by_gate) check.fail("priority", "values and by_gate", "one of them");
  if (capacity < 1) check.fail("capacity", std::to_string(capacity), "at least 1");
  check.number(second_threshold >= 0 && std::isfinite(second_threshold), "second_threshold", second_threshold,
               "a finite number from 0 on");
  if (second_threshold > 0) {
    if (sizes.choices < 2) check.fail("second_threshold", "one choice", "top_k of at least 2");
    check_vector(check, uniforms, "uniforms", sizes.tokens, {DType::f32});
  }
}

}  // namespace gptcore
