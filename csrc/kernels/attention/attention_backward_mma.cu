// Attention's backward pass by mma.sync, from sm_80 on. Three kernels: rows' constants, then a block for each tile of
// keys and key head,
//
//   for each query head of the group, each tile of queries that sees any of the keys:
//     S = q k^T    P = exp2(S - lse)    dP = dout v^T    dS = P (dP - delta)
//     dv += P^T dout    dk += dS^T q    dq += dS k
//
// and what sinks and bias need. dk and dv are sums in registers, over heads and tiles in order. dq is added up in
// memory, in f32 and in one order: tiles of keys from the last to the first. Blocks start in that order too, and each
// waits for its turn at a tile of queries; under a causal mask those before it have been there already, since the last
// keys have the fewest queries and each block begins at its first. The first writes, the last converts, so dq costs
// neither a pass of zeros nor one of conversion.
#include <type_traits>

#include "core/cuda/scratch.h"
#include "kernels/attention/attention_backward_bias.cuh"
#include "kernels/attention/attention_backward_keys.cuh"
#include "kernels/attention/attention_backward_rows.cuh"
#include "kernels/attention/attention_cuda.h"

namespace gptcore::cuda {
namespace {

using namespace backward_mma;

// Whether all rows of a tensor begin at multiples of `bytes`.
template <class T>
bool aligned(const AttentionTensor& t, int64_t bytes) {
  const int64_t strides = t.batch | t.token | t.head;
  return ((reinterpret_cast<uintptr_t>(t.data) |
           static_cast<uintptr_t>(strides * static_cast<int64_t>(sizeof(T)))) &
          static_cast<uintptr_t>(bytes - 1)) == 0;
}

int64_t padded(int64_t bytes) { return (bytes + 255) / 256 * 256; }

// What a call's scratch memory holds, one after the other; null gives its size.
int64_t place_scratch(BackwardCall* c, const BackwardTiles& tiles, char* base) {
  const int64_t places = c->query_tiles * c->p.heads, rows = places * tiles.queries;
  int64_t used = 0;
  const auto take = [&](auto*& piece, int64_t count) {
    piece = reinterpret_cast<std::remove_reference_t<decltype(piece)>>(base + used);
    used += padded(count * 4);
  };
  take(c->lse, rows), take(c->delta, rows), take(c->dq, rows * tiles.head), take(c->turns, places + 1);
  take(c->sinks, c->p.dsinks ? places : 0);
  return used;
}

template <class T, int kHead>
void bias_gradient(const BackwardCall& c) {
  constexpr BackwardTiles kTiles = backward_tiles(sizeof(T), kHead, true);
  const AttentionProblem& p = c.p;
  const int64_t pairs =
      (p.queries + kTiles.queries - 1) / kTiles.queries * ((p.keys + kTiles.keys - 1) / kTiles.keys);
  const int64_t slices = (p.dbias_batches ? p.batch : 1) * (p.dbias_heads ? p.heads : 1);
  launch<&backward_bias<T, kHead>>(
      {dim3(static_cast<unsigned>(pairs * slices)), dim3(kBackwardThreads), kTiles.shared_bytes(1)}, c);
}

template <class T, int kHead, bool kModified>
void backward(const AttentionProblem& p) {
  constexpr BackwardTiles kTiles = backward_tiles(sizeof(T), kHead, kModified);
  BackwardCall c{};
  c.p = p;
  const auto tiles = [&](const int32_t* cu, int64_t total, int64_t length, int tile) {
    return static_cast<int>(attention_tiles(cu, total, p.batch, length, tile));
  };
  c.query_tiles = tiles(p.cu_q, p.total_q, p.queries, kTiles.queries);
  c.key_tiles = tiles(p.cu_k, p.total_k, p.keys, kTiles.keys);
  c.stages = kTiles.stages(limits().shared_bytes);
  c.packed_rows = aligned<T>(p.q, 16) && aligned<T>(p.k, 16) && aligned<T>(p.v, 16) && aligned<T>(p.dout, 16);
  c.pairs =
      aligned<T>(p.dq, 2 * sizeof(T)) && aligned<T>(p.dk, 2 * sizeof(T)) && aligned<T>(p.dv, 2 * sizeof(T));
  const DeviceScratch scratch(place_scratch(&c, kTiles, nullptr));
  place_scratch(&c, kTiles, scratch.as<char>());
  c.broken = c.turns + c.query_tiles * p.heads;
  set_bytes(c.turns, 0, (c.query_tiles * p.heads + 1) * 4);
  prepare_rows<T>({p, c.query_tiles, kTiles.queries, aligned<T>(p.dout, 16) && aligned<T>(p.out, 16), c.lse,
                   c.delta, c.sinks, c.broken});
  const dim3 grid(static_cast<unsigned>(c.key_tiles), static_cast<unsigned>(p.kv_heads));
  launch<&backward_keys<T, kHead, kModified>>(
      {grid, dim3(kBackwardThreads), kTiles.shared_bytes(c.stages), 1, true}, c);
  if constexpr (kModified) {
    if (p.dbias.data) bias_gradient<T, kHead>(c);
  }
}

// Whether the plain kernel does: intervals of keys and sinks, which act on lse alone, are all there is.
bool plain(const AttentionProblem& p) {
  return p.soft_cap == 0.0f && !p.slopes && !p.mask.data && !p.bias.data && p.stride == 0 &&
         p.keep == kKeepAll;
}

template <class T, bool kModified>
void backward_of_few(const AttentionProblem& p) {
  const int head = backward_head(true, p.head_dim);
  if (head == 64) return backward<T, 64, kModified>(p);
  if (head == 128) return backward<T, 128, kModified>(p);
  backward<T, 256, kModified>(p);
}

void backward_plain(const AttentionProblem& p) {
  const int head = backward_head(false, p.head_dim);
  if (head == 32) return backward<bf16, 32, false>(p);
  if (head == 64) return backward<bf16, 64, false>(p);
  if (head == 96) return backward<bf16, 96, false>(p);
  if (head == 128) return backward<bf16, 128, false>(p);
  if (head == 192) return backward<bf16, 192, false>(p);
  backward<bf16, 256, false>(p);
}

}  // namespace

template <>
void attention_backward_mma<float>(const AttentionProblem& p) {
  backward_of_few<float, true>(p);  // one kernel for all options
}
template <>
void attention_backward_mma<tf32>(const AttentionProblem& p) {
  backward_of_few<tf32, true>(p);
}
template <>
void attention_backward_mma<bf16>(const AttentionProblem& p) {
  plain(p) ? backward_plain(p) : backward_of_few<bf16, true>(p);
}
template <>
void attention_backward_mma<f16>(const AttentionProblem& p) {
  plain(p) ? backward_of_few<f16, false>(p) : backward_of_few<f16, true>(p);
}

}  // namespace gptcore::cuda
