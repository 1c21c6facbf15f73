// core/cuda/tensor_map.h for the processor: a map that holds what it was made from.
#include "core/cuda/tensor_map.h"

#include <stdexcept>
#include <string>

namespace gptcore::cuda {

TensorMap tensor_map(const TensorBoxes& b) {
  if (const char* reason = unfit_for_tensor_map(b))
    throw std::runtime_error(std::string("simt: no tensor map for ") + reason);
  TensorMap map{};
  map.words[0] = reinterpret_cast<uint64_t>(b.data);
  map.words[1] = static_cast<uint64_t>(b.rank) | static_cast<uint64_t>(size_of(b.dtype)) << 8 |
                 static_cast<uint64_t>(b.swizzle) << 16;
  for (int d = 0; d < b.rank; ++d) {
    map.words[2 + d] = static_cast<uint64_t>(b.sizes[d]);
    map.words[7 + d] = static_cast<uint64_t>(b.strides[d] * size_of(b.dtype));
    map.words[12] |= static_cast<uint64_t>(b.box[d]) << (9 * d);
  }
  return map;
}

}  // namespace gptcore::cuda
