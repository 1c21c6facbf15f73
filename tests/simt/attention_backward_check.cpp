#include "attention_backward_check.h"

#include <pybind11/stl.h>

#include <utility>
#include <vector>

#include "core/dtype.h"
#include "kernels/attention/attention_backward_sm90_schedule.h"
#include "kernels/attention/attention_cuda.h"

namespace gptcore::cuda {
namespace {

using backward_sm90::BlockOrder;

// Of every tile of keys the range of tiles of queries, and of every tile of queries the first tile of keys.
auto ranges(int queries, int keys, int left, int right, int prefix, int query_tile) {
  AttentionSequence s{};
  s.queries = queries, s.keys = keys, s.left = left, s.right = right, s.prefix = prefix;
  constexpr int kKeys = backward_sm90::TileShape<64>::kKeys;
  std::vector<std::pair<int, int>> of_keys;
  std::vector<int> first;
  for (int k = 0; k * kKeys < keys; ++k) {
    const auto range = backward_sm90::queries_of(s, k, kKeys, query_tile);
    of_keys.emplace_back(range.begin, range.end);
  }
  for (int q = 0; q * query_tile < queries; ++q)
    first.push_back(backward_sm90::first_key_tile(s, q, kKeys, query_tile));
  return std::make_pair(of_keys, first);
}

// Member and tile of keys of every block.
auto order(int tiles, int members, int abreast) {
  const BlockOrder order{members, abreast, tiles};
  std::vector<std::pair<int, int>> places;
  for (int block = 0; block < order.blocks(); ++block)
    places.emplace_back(order.place_of(block).member, order.place_of(block).tile);
  return places;
}

// Whether the kernel takes a problem with contiguous tensors of these sizes; `change` names what is unusual.
bool takes(int64_t queries, int64_t keys, int64_t heads, int64_t kv_heads, int64_t size,
           const std::string& change) {
  static char data[16];
  static int32_t lengths[2];
  AttentionProblem p{};
  p.batch = 1, p.queries = queries, p.keys = keys, p.heads = heads, p.kv_heads = kv_heads, p.head_dim = size;
  p.left = p.right = -1, p.keep = kKeepAll;
  p.q = p.out = p.dout = p.dq = {data, queries * heads * size, heads * size, size};
  p.k = p.v = p.dk = p.dv = {data, keys * kv_heads * size, kv_heads * size, size};
  if (change == "packed") p.cu_q = p.cu_k = lengths, p.total_q = queries, p.total_k = keys;
  if (change == "prefix") p.prefix = lengths;
  if (change == "pattern") p.stride = 8;
  if (change == "mask") p.mask.data = data;
  if (change == "bias") p.bias.data = data;
  if (change == "odd data") p.v.data = data + 2;
  if (change == "odd stride") p.dk.token += 4;
  if (change == "expanded") p.k.head = 0;
  return attention_backward_sm90_takes<bf16>(p);
}

}  // namespace

void define_attention_backward_check(pybind11::module_& m) {
  m.def("backward_sm90_ranges", &ranges);
  m.def("backward_sm90_order", &order);
  m.def("backward_sm90_takes", &takes);
  m.def("backward_sm90_members_abreast", &backward_sm90::members_abreast);
  m.def("backward_sm90_shared_bytes", [](int size) {
    return size == 64 ? backward_sm90::TileShape<64>::kSharedBytes
                      : backward_sm90::TileShape<128>::kSharedBytes;
  });
}

}  // namespace gptcore::cuda
