#include "attention_check.h"

#include <pybind11/stl.h>

#include <array>
#include <vector>

#include "kernels/attention/attention_forward_sm90.cuh"

namespace gptcore::cuda {
namespace {

// (sequence, head, first query) of each tile in the order in which blocks take them.
std::vector<std::array<int, 3>> forward_sm90_order(int64_t batch, int64_t queries, int64_t keys,
                                                   int64_t heads, int64_t kv_heads, int64_t head_dim) {
  AttentionProblem p{};
  p.batch = batch, p.queries = queries, p.keys = keys;
  p.heads = heads, p.kv_heads = kv_heads, p.head_dim = head_dim;
  const ForwardTiles tiles = forward_tiles(p);
  std::vector<std::array<int, 3>> order;
  for (int i = 0; i < tiles.count; ++i) {
    const ForwardTile tile = forward_tile(tiles, i);
    order.push_back({tile.index, tile.head, tile.first});
  }
  return order;
}

}  // namespace

void define_attention_check(pybind11::module_& m) { m.def("forward_sm90_order", &forward_sm90_order); }

}  // namespace gptcore::cuda
