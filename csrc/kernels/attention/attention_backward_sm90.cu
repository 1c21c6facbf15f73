// Attention's backward for sm_90: row constants, tiles (attention_backward_sm90.cuh), dq out of its sums.
#include "kernels/attention/attention_backward_sm90.cuh"

#include "core/cuda/scratch.h"
#include "kernels/attention/attention_backward_sm90_rows.cuh"
#include "kernels/attention/attention_cuda.h"

namespace gptcore::cuda {
namespace backward_sm90 {
namespace {

// A tensor as boxes of 64 columns by `rows` tokens.
template <class T>
TensorBoxes boxes_of(const AttentionProblem& p, const AttentionTensor& t, int64_t tokens, int64_t heads,
                     int rows) {
  return {t.data,
          dtype_of<T>(),
          4,
          {p.head_dim, tokens, heads, p.batch},
          {1, t.token, t.head, t.batch},
          {64, rows, 1, 1},
          128};
}

bool in_packs(const AttentionProblem& p, const AttentionTensor& t) {
  return can_pack<uint16_t>(t.data, t.token | t.head | (p.batch > 1 ? t.batch : 0));
}

int bound_of(int64_t window, const AttentionProblem& p) {
  return window < 0 || window >= p.queries + p.keys ? -1 : static_cast<int>(window);
}

template <int D>
Schedule schedule_of(const AttentionProblem& p) {
  using Tiles = TileShape<D>;
  Schedule s;
  s.queries = static_cast<int>(p.queries), s.keys = static_cast<int>(p.keys);
  s.left = bound_of(p.left, p), s.right = bound_of(p.right, p);
  s.query_tile = Tiles::kQueries, s.key_tile = Tiles::kKeys;
  s.group = static_cast<int>(p.heads / p.kv_heads);
  s.members = static_cast<int>(p.batch * p.kv_heads);
  s.members_abreast = members_abreast(p.queries, s.group, D, s.members);
  return s;
}

template <class T, int D, bool kModified>
void compute_tiles(const Arguments& a) {
  launch<&attention_backward_tiles<T, D, kModified>>(
      {dim3(static_cast<unsigned>(a.schedule.blocks())), dim3(TileShape<D>::kThreads),
       TileShape<D>::kSharedBytes, 1, true},
      a);
}

template <class T, int D>
void backward(const AttentionProblem& p) {
  using Tiles = TileShape<D>;
  const Schedule s = schedule_of<D>(p);
  const int64_t rows = p.batch * p.heads, padded = int64_t{s.query_tiles()} * Tiles::kQueries;
  const int64_t parts = rows * s.query_tiles() * Tiles::kConsumers;
  const DeviceScratch constants(2 * rows * padded * 4), sums(parts * Tiles::kDqElements * 4),
      turns(parts * 4);
  float* lse = constants.as<float>();
  const RowArguments r{p, s, lse, lse + rows * padded, sums.as<float>(), turns.as<int>()};
  set_bytes(turns.as<int>(), 0, parts * 4);

  constexpr int kRowsOfBlock = kRowThreads / (D / kPackElements<T>);
  const auto row_blocks = static_cast<unsigned>(padded / kRowsOfBlock);
  launch<&prepare_rows<T, D>>({dim3(row_blocks, static_cast<unsigned>(rows)), dim3(kRowThreads)}, r);
  if (p.dsinks) launch<&sum_sinks>({dim3(static_cast<unsigned>(p.heads)), dim3(kRowThreads), 32 * 4}, r);
  const Arguments a{tensor_map(boxes_of<T>(p, p.q, p.queries, p.heads, Tiles::kQueries)),
                    tensor_map(boxes_of<T>(p, p.dout, p.queries, p.heads, Tiles::kQueries)),
                    tensor_map(boxes_of<T>(p, p.k, p.keys, p.kv_heads, Tiles::kKeys)),
                    tensor_map(boxes_of<T>(p, p.v, p.keys, p.kv_heads, Tiles::kKeys)),
                    s,
                    r.lse,
                    r.delta,
                    sums.as<float>(),
                    turns.as<int>(),
                    p.dk,
                    p.dv,
                    static_cast<int>(p.kv_heads),
                    p.scale,
                    {p.soft_cap, p.slopes, p.slopes_batch, p.slopes_head, p.keep, p.keep_scale, p.seed,
                     p.seed_at, p.offset}};
  if (p.soft_cap > 0 || p.slopes || p.keep < kKeepAll) {
    compute_tiles<T, D, true>(a);
  } else {
    compute_tiles<T, D, false>(a);
  }
  launch<&write_dq<T, D>>(
      {dim3(static_cast<unsigned>(s.query_tiles()), static_cast<unsigned>(rows)), dim3(kRowThreads)}, r);
}

}  // namespace
}  // namespace backward_sm90

template <class T>
bool attention_backward_sm90_takes(const AttentionProblem& p) {
  using namespace backward_sm90;
  constexpr int64_t kMost = int64_t{1} << 24;  // tokens: sums of places stay in 32 bits
  if (limits().arch != 90 || (p.head_dim != 64 && p.head_dim != 128)) return false;
  if (p.cu_q || p.prefix || p.stride || p.mask.data || p.bias.data) return false;
  if (p.queries < 1 || p.queries > kMost || p.keys < 1 || p.keys > kMost || p.batch * p.heads > 65535)
    return false;
  if (schedule_of<64>(p).blocks() > INT32_MAX) return false;
  const int rows = TileShape<64>::kKeys;
  return !unfit_for_tensor_map(boxes_of<T>(p, p.q, p.queries, p.heads, rows)) &&
         !unfit_for_tensor_map(boxes_of<T>(p, p.dout, p.queries, p.heads, rows)) &&
         !unfit_for_tensor_map(boxes_of<T>(p, p.k, p.keys, p.kv_heads, rows)) &&
         !unfit_for_tensor_map(boxes_of<T>(p, p.v, p.keys, p.kv_heads, rows)) && in_packs(p, p.dout) &&
         in_packs(p, p.out) && in_packs(p, p.dq) && in_packs(p, p.dk) && in_packs(p, p.dv);
}

template <class T>
void attention_backward_sm90(const AttentionProblem& p) {
  if (p.head_dim == 64) {
    backward_sm90::backward<T, 64>(p);
  } else {
    backward_sm90::backward<T, 128>(p);
  }
}

template bool attention_backward_sm90_takes<bf16>(const AttentionProblem& p);
template bool attention_backward_sm90_takes<f16>(const AttentionProblem& p);
template void attention_backward_sm90<bf16>(const AttentionProblem& p);
template void attention_backward_sm90<f16>(const AttentionProblem& p);

}  // namespace gptcore::cuda
