// Places at experts, on the processor: which choices are kept, in what order they come, which row each one gets.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>

#include "kernels/moe_router/moe_router_checks.h"

namespace gptcore {

// Tokens by falling priority, of equal ones the earlier first; a NaN comes last.
inline void sort_tokens(const float* priority, int64_t tokens, int32_t* order) {
  for (int64_t n = 0; n < tokens; ++n) order[n] = static_cast<int32_t>(n);
  const auto key = [priority](int32_t n) {
    return std::isnan(priority[n]) ? -std::numeric_limits<float>::infinity() : priority[n];
  };
  std::sort(order, order + tokens, [&](int32_t a, int32_t b) {
    const float x = key(a), y = key(b);
    return x != y ? x > y : a < b;
  });
}

struct RouterPlaces {
  RouterSizes sizes;
  const int32_t* order;  // null: as they come
  int64_t capacity;
  const int32_t* chosen;
  float* gates;
  int32_t* rows;

  void drop(int64_t at) const { rows[at] = -1, gates[at] = 0.0f; }

  // Marks second choices that chance does not keep. A NaN gate is not kept.
  void draw_second(const float* uniforms, double threshold) const {
    for (int64_t n = 0; n < sizes.tokens; ++n) {
      const float *gate = gates + n * sizes.choices, share = gate[1] / (gate[0] + gate[1]);
      rows[n * sizes.choices + 1] = static_cast<double>(uniforms[n]) * threshold < share ? 0 : -1;
    }
  }

  // Rows of choices, from where the rows of each expert start; `next` counts them, over the capacity too.
  void assign(bool second_is_drawn, const int32_t* offsets, int32_t* next) const {
    for (int64_t k = 0; k < sizes.choices; ++k) {
      for (int64_t i = 0; i < sizes.tokens; ++i) {
        const int64_t at = (order ? order[i] : i) * sizes.choices + k;
        const bool asks = chosen[at] >= 0 && !(k == 1 && second_is_drawn && rows[at] < 0);
        const int32_t place = asks ? next[chosen[at]]++ : -1;
        if (asks && place < capacity) {
          rows[at] = offsets[chosen[at]] + place;
        } else {
          drop(at);
        }
      }
    }
  }

  // Choices that ask for a place, by expert, where not all second ones do.
  void count_asking(int32_t* requested) const {
    for (int64_t n = 0; n < sizes.tokens; ++n) {
      for (int64_t k = 0; k < sizes.choices; ++k) {
        const int64_t at = n * sizes.choices + k;
        if (chosen[at] >= 0 && !(k == 1 && rows[at] < 0)) ++requested[chosen[at]];
      }
    }
  }
};

}  // namespace gptcore
