// Lists of tensors as a kernel's own parameters: no copy to the device, nothing to keep alive, and a graph that
// captures the launch keeps them. A launch takes 32,764 bytes (CUDA 12.1 on, sm_70 on), so a thousand tensors are a few.
#pragma once

#include <cstdint>

#include "core/cuda/launch.cuh"

namespace gptcore::cuda {

constexpr int64_t kTableBytes = 32000;  // what is left is for a kernel's other parameters

// Tensors of one launch; each has neighbouring blocks of the grid, at least one.
template <class Entry>
struct TensorTable {
  static constexpr int kCapacity =
      static_cast<int>((kTableBytes - 16) / static_cast<int64_t>(sizeof(Entry) + sizeof(int32_t)));
  Entry entries[kCapacity];
  int32_t first[kCapacity + 1];  // block of each, and the end
  int32_t count;

  __device__ __forceinline__ int find(int block) const {
    int low = 0, high = count;
    while (high - low > 1) {
      const int middle = (low + high) / 2;
      (first[middle] <= block ? low : high) = middle;
    }
    return low;
  }
};

constexpr int64_t kMostBlocks = 0x7fffffff;

// Fills tables with what make(i, &entry) makes of tensors 0 .. count - 1, which returns how many blocks each wants, and
// calls start(table, blocks) with each table. Tensors of no blocks are left out.
template <class Entry, class Make, class Start>
void for_tables(int64_t count, const Make& make, const Start& start) {
  TensorTable<Entry> table;
  static_assert(sizeof(table) <= kTableBytes);
  int64_t blocks = 0;
  table.count = 0;
  const auto flush = [&] {
    if (table.count == 0) return;
    table.first[table.count] = static_cast<int32_t>(blocks);
    start(table, static_cast<unsigned>(blocks));
    table.count = 0, blocks = 0;
  };
  for (int64_t i = 0; i < count; ++i) {
    Entry entry{};
    const int64_t own = make(i, &entry);
    if (own == 0) continue;
    if (table.count == table.kCapacity || blocks + own > kMostBlocks) flush();
    table.entries[table.count] = entry;
    table.first[table.count++] = static_cast<int32_t>(blocks);
    blocks += own;
  }
  flush();
}

}  // namespace gptcore::cuda
