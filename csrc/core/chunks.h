// A piece of one tensor out of a list, the unit of work of kernels that run over all parameters of a model.
#pragma once

#include <cstdint>

namespace gptcore {

struct Chunk {
  int64_t tensor, begin, size;
};

}  // namespace gptcore
