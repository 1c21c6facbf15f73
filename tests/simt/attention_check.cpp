#include "attention_check.h"

#include <pybind11/stl.h>

#include <array>
#include <vector>

#include "kernels/attention/attention_backward_tiles.h"
#include "kernels/attention/attention_decode_plan.h"
#include "kernels/attention/attention_forward_sm90.cuh"
#include "kernels/attention/attention_forward_tiles.h"

namespace py = pybind11;

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

// (padded head size, rows, threads, keys, bytes of shared memory).
py::tuple forward_mma_shape(int element_bytes, int64_t head_dim, bool plain, bool is_tf32) {
  const int dim = padded_dim(element_bytes, head_dim);
  const ForwardShape shape = forward_shape(element_bytes, dim, plain, is_tf32);
  return py::make_tuple(dim, shape.rows(), shape.threads(), shape.keys,
                        shape.shared_bytes(dim * element_bytes));
}

// (begin, keys of a part, parts, row blocks, the grid's parts), or None where it is no problem for decoding's kernel.
py::object decode_plan_of(int64_t batch, int64_t queries, int64_t keys, int64_t heads, int64_t kv_heads,
                          int64_t left) {
  AttentionProblem p{};
  p.batch = batch, p.queries = queries, p.keys = keys, p.heads = heads, p.kv_heads = kv_heads;
  p.left = left, p.right = 0, p.scale = 1, p.keep = kKeepAll;
  if (!decode_takes(p)) return py::none();
  const DecodePlan plan = decode_plan(p);
  const KeySplit split =
      split_keys(static_cast<int>(queries), static_cast<int>(keys), static_cast<int>(left), plan.max_parts);
  return py::make_tuple(split.begin, split.part_keys, split.parts, plan.row_blocks, plan.parts);
}

// (parts that the grid over pages has for each sequence, that a sequence may have) with room for so many keys.
py::tuple paged_parts(int64_t queries, int64_t room, int64_t heads, int64_t kv_heads, int64_t left) {
  static const int32_t table = 0;
  AttentionProblem p{};
  p.batch = 1, p.queries = queries, p.keys = room, p.heads = heads, p.kv_heads = kv_heads;
  p.left = left, p.scale = 1, p.keep = kKeepAll, p.pages.table = &table;
  const DecodePlan plan = decode_plan(p);
  return py::make_tuple(plan.parts, plan.max_parts);
}

bool decodes_packed(int64_t documents, int64_t total) {
  static const int32_t bounds = 0;
  AttentionProblem p{};
  p.batch = documents, p.queries = p.total_q = total, p.heads = p.kv_heads = 8, p.keep = kKeepAll;
  p.cu_q = &bounds;
  return decode_takes(p);
}

py::tuple split_keys_of(int queries, int keys, int left, int max_parts) {
  const KeySplit split = split_keys(queries, keys, left, max_parts);
  return py::make_tuple(split.begin, split.part_keys, split.parts);
}

// A kernel's tiles, and what they take of a block's memory, of which `limit` bytes may be had.
py::dict backward_tiles_of(int element, int head, bool modified, int64_t limit) {
  const BackwardTiles tiles = backward_tiles(element, head, modified);
  py::dict d;
  d["queries"] = tiles.queries, d["keys"] = tiles.keys, d["key_warps"] = tiles.key_warps;
  d["head_pitch"] = tiles.head_pitch(), d["score_pitch"] = tiles.score_pitch();
  d["stages"] = tiles.stages(limit), d["shared_bytes"] = tiles.shared_bytes(tiles.stages(limit));
  return d;
}

}  // namespace

void define_attention_check(py::module_& m) {
  m.def("forward_sm90_order", &forward_sm90_order);
  m.def("forward_mma_shape", &forward_mma_shape);
  m.def("decode_shared_bytes", &decode_shared_bytes);
  m.def("decode_plan", &decode_plan_of);
  m.def("paged_parts", &paged_parts);
  m.def("split_keys", &split_keys_of);
  m.def("decodes_packed", &decodes_packed);
  m.def("backward_head", &backward_head);
  m.def("backward_tiles", &backward_tiles_of);
}

}  // namespace gptcore::cuda
