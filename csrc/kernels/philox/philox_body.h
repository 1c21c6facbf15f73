// What philox.cpp hands to the per-ISA bodies.
#pragma once

#include <cstdint>

namespace gptcore {

struct PhiloxBodies {
  void (*run)(uint64_t seed, const uint32_t* counters, int64_t count, uint32_t* out);
};

}  // namespace gptcore
