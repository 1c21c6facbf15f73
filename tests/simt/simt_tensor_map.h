// The emulated copy engine's view of a tensor map.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>

#include "core/cuda/tensor_map.h"

namespace gptcore::cuda {

struct SimtBoxes {
  unsigned char* data;
  int rank, element, swizzle;
  int64_t sizes[5], strides[5];  // strides in bytes
  int box[5];

  explicit SimtBoxes(const TensorMap& map)
      : data(reinterpret_cast<unsigned char*>(map.words[0])),
        rank(static_cast<int>(map.words[1] & 0xff)),
        element(static_cast<int>(map.words[1] >> 8 & 0xff)),
        swizzle(static_cast<int>(map.words[1] >> 16 & 0xff)) {
    for (int d = 0; d < 5; ++d) {
      sizes[d] = static_cast<int64_t>(map.words[2 + d]);
      strides[d] = static_cast<int64_t>(map.words[7 + d]);
      box[d] = static_cast<int>(map.words[12] >> (9 * d) & 0x1ff);
    }
  }

  int64_t bytes() const {
    int64_t count = element;
    for (int d = 0; d < rank; ++d) count *= box[d];
    return count;
  }

  // Calls with the place in shared memory of each 16 bytes of the box at `at` which begins at `offset` there, where
  // they lie in the tensor, and how many of them do.
  template <class Call>
  void each_chunk(const std::array<int, 5>& at, int64_t offset, const Call& call) const {
    const int64_t row_bytes = int64_t{box[0]} * element;
    const int64_t mask = swizzle == 128 ? 7 : swizzle == 64 ? 3 : swizzle == 32 ? 1 : 0;
    for (int64_t row = 0; row < bytes() / row_bytes; ++row) {
      uint64_t address = reinterpret_cast<uint64_t>(data);
      bool inside = true;
      int64_t rest = row;
      for (int d = 1; d < rank; ++d) {
        const int64_t c = at[static_cast<size_t>(d)] + rest % box[d];
        rest /= box[d];
        inside &= c >= 0 && c < sizes[d];
        address += static_cast<uint64_t>(c) * static_cast<uint64_t>(strides[d]);
      }
      for (int64_t byte = 0; byte < row_bytes; byte += 16) {
        const int64_t first = at[0] + byte / element, left = (sizes[0] - first) * element;
        const int64_t place = offset + row * row_bytes + byte;
        const int64_t count = !inside || first < 0 || left <= 0 ? 0 : left < 16 ? left : 16;
        call(place ^ (place >> 7 & mask) << 4,
             reinterpret_cast<unsigned char*>(address +
                                              static_cast<uint64_t>(first) * static_cast<uint64_t>(element)),
             static_cast<int>(count));
      }
    }
  }
};

template <size_t rank>
std::array<int, 5> simt_coordinates(const int (&c)[rank]) {
  std::array<int, 5> all{};
  for (size_t i = 0; i < rank; ++i) all[i] = c[i];
  return all;
}

}  // namespace gptcore::cuda
