// Attention's backward for sm_90: row constants, tiles (attention_backward_sm90.cuh), dq out of its sums.
#include "kernels/attention/attention_backward_sm90.cuh"

#include "core/cuda/scratch.h"
#include "kernels/attention/attention_backward_rows.cuh"
#include "kernels/attention/attention_backward_sm90_dq.cuh"
#include "kernels/attention/attention_cuda.h"

namespace gptcore::cuda {
namespace backward_sm90 {
namespace {

bool in_packs(const AttentionProblem& p, const AttentionTensor& t) {
  return can_pack<uint16_t>(t.data, t.token | t.head | (p.batch > 1 ? t.batch : 0));
}

template <int D>
BlockOrder order_of(const AttentionProblem& p) {
  const int64_t members = p.cu_q ? p.kv_heads : p.batch * p.kv_heads;
  const int64_t tiles = attention_tiles(p.cu_k, p.total_k, p.batch, p.keys, TileShape<D>::kKeys);
  const int64_t queries = p.cu_q ? (p.total_q + p.batch - 1) / p.batch : p.queries;
  return {static_cast<int>(members), members_abreast(queries, p.heads / p.kv_heads, D, members),
          static_cast<int>(p.cu_q ? tiles : tiles / p.batch)};
}

template <class T, int D, bool kModified>
void compute_tiles(const Arguments& a) {
  launch<&attention_backward_tiles<T, D, kModified>>(
      {dim3(static_cast<unsigned>(a.order.blocks())), dim3(TileShape<D>::kThreads),
       TileShape<D>::kSharedBytes, 1, true},
      a);
}

template <class T, int D>
void backward(const AttentionProblem& p) {
  using Tiles = TileShape<D>;
  const auto tiles =
      static_cast<int>(attention_tiles(p.cu_q, p.total_q, p.batch, p.queries, Tiles::kQueries));
  const int64_t places = tiles * p.heads, rows = places * Tiles::kQueries, parts = places * Tiles::kConsumers;
  const DeviceScratch constants((2 * rows + (p.dsinks ? places : 0)) * 4), sums(rows * D * 4),
      counters((parts + 1) * 4);
  float* lse = constants.as<float>();
  int *turns = counters.as<int>(), *broken = turns + parts;
  set_bytes(turns, 0, (parts + 1) * 4);
  prepare_rows<T>({p, tiles, Tiles::kQueries, true, lse, lse + rows, lse + 2 * rows, broken});
  const DType dtype = dtype_of<T>();
  const Arguments a{tensor_map(query_boxes(p.q, dtype, p, Tiles::kQueries)),
                    tensor_map(query_boxes(p.dout, dtype, p, Tiles::kQueries)),
                    tensor_map(key_boxes(p.k, dtype, p, Tiles::kKeys)),
                    tensor_map(key_boxes(p.v, dtype, p, Tiles::kKeys)),
                    p,
                    order_of<D>(p),
                    lse,
                    lse + rows,
                    sums.as<float>(),
                    turns,
                    broken};
  if (p.soft_cap > 0 || p.slopes || p.keep < kKeepAll) {
    compute_tiles<T, D, true>(a);
  } else {
    compute_tiles<T, D, false>(a);
  }
  launch<&write_dq<T, D>>(
      {dim3(static_cast<unsigned>(tiles), static_cast<unsigned>(p.heads)), dim3(kDqThreads)}, a);
}

}  // namespace
}  // namespace backward_sm90

template <class T>
bool attention_backward_sm90_takes(const AttentionProblem& p) {
  using namespace backward_sm90;
  constexpr int64_t kMost = int64_t{1} << 24;  // tokens: sums of places stay in 32 bits
  if (limits().arch != 90 || (p.head_dim != 64 && p.head_dim != 128)) return false;
  if (p.stride || p.mask.data || p.bias.data) return false;
  if (p.batch < 1 || p.queries < 1 || p.queries > kMost || p.keys < 1 || p.keys > kMost || p.heads > 65535)
    return false;
  const int64_t tiles = attention_tiles(p.cu_k, p.total_k, p.batch, p.keys, TileShape<64>::kKeys);
  if (tiles * p.kv_heads > INT32_MAX) return false;
  const auto fit = [](const TensorBoxes& b) { return !unfit_for_tensor_map(b); };
  constexpr int kRows = TileShape<64>::kKeys;
  constexpr DType kType = dtype_of<T>();
  return fit(query_boxes(p.q, kType, p, kRows)) && fit(query_boxes(p.dout, kType, p, kRows)) &&
         fit(key_boxes(p.k, kType, p, kRows)) && fit(key_boxes(p.v, kType, p, kRows)) &&
         in_packs(p, p.dout) && in_packs(p, p.out) && in_packs(p, p.dq) && in_packs(p, p.dk) &&
         in_packs(p, p.dv);
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
