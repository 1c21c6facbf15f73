// Embedding on CUDA: rows copied by id; backward a sort of the ids and sums over each one's occurrences.
#include "core/cuda/grid_of_rows.cuh"
#include "core/cuda/pack.cuh"
#include "core/cuda/scratch.h"
#include "kernels/embedding/embedding_body.h"
#include "kernels/embedding/embedding_sort.cuh"
#include "kernels/embedding/embedding_sums.cuh"

namespace gptcore::cuda {
namespace {

constexpr int kThreads = 256;

// Unit: uint4, or uint16_t where rows lie at odd places. Bits that are all set are NaN in both types.
template <class Id, class Unit>
__global__ void __launch_bounds__(kThreads) copy_rows(const EmbeddingForward a, int64_t units) {
  const int64_t at = int64_t{blockIdx.x} * blockDim.x + threadIdx.x;
  if (at >= units) return;
  for (int64_t n = int64_t{blockIdx.y} * blockDim.y + threadIdx.y; n < a.count;
       n += int64_t{gridDim.y} * blockDim.y) {
    const int64_t id = static_cast<const Id*>(a.ids)[n];
    Unit unit;
    if (id >= 0 && id < a.vocabulary) {
      unit = reinterpret_cast<const Unit*>(a.table + id * a.table_stride)[at];
    } else {
      memset(&unit, 0xff, sizeof(unit));
    }
    reinterpret_cast<Unit*>(a.out + n * a.out_stride)[at] = unit;
  }
}

template <class Id, class Unit>
void forward_by(const EmbeddingForward& a) {
  const int64_t units = a.row_bytes / static_cast<int64_t>(sizeof(Unit));
  const GridOfRows g = grid_of_rows(a.count, units, kThreads, 65535);
  launch<&copy_rows<Id, Unit>>({g.grid(), g.block()}, a, units);
}

template <class Id>
void forward(const EmbeddingForward& a) {
  const bool packed = can_pack<char>(a.table, a.table_stride) && can_pack<char>(a.out, a.out_stride) &&
                      a.row_bytes % kPackBytes == 0;
  packed ? forward_by<Id, uint4>(a) : forward_by<Id, uint16_t>(a);
}

template <class T, bool bf16_dweight>
void backward(const EmbeddingBackward& a) {
  EmbeddingSums s{};
  s.grad_out = a.grad_out, s.dweight = a.dweight;
  s.vocabulary = a.vocabulary, s.tokens = a.tokens, s.width = a.width, s.grad_stride = a.grad_stride;
  s.accumulate = a.accumulate, s.bf16_dweight = bf16_dweight;
  s.packed = rows_are_packed<T>(a.width, a.grad_out, a.grad_stride, a.dweight, 0);
  const DeviceScratch sort(sort_room(a.tokens, a.vocabulary) * static_cast<int64_t>(sizeof(int32_t)));
  s.sorted = sort_ids(a.ids, a.long_ids, a.tokens, a.vocabulary, sort.as<int32_t>());
  const bool chunks = a.tokens > kChunk;  // else no id can have more than one
  s.slots = chunks ? chunk_slots(a.tokens) : 0;
  const DeviceScratch parts(s.slots * a.width * static_cast<int64_t>(sizeof(float)));
  s.chunks = parts.as<float>();
  const int64_t row_packs = (a.width + kPackElements<T> - 1) / kPackElements<T>;
  const GridOfRows by_slot = grid_of_rows(s.slots, row_packs, kThreads, 65535);
  if (chunks) launch<&sum_chunks<T>>({by_slot.grid(), by_slot.block()}, s);
  const GridOfRows by_id = grid_of_rows(a.vocabulary, row_packs, kThreads, 65535);
  launch<&sum_ids<T>>({by_id.grid(), by_id.block()}, s);
}

}  // namespace

GPTCORE_CUDA_BODIES(EmbeddingBodies, embedding_bodies) = {
    {forward<int32_t>, forward<int64_t>},
    {{backward<float, false>, backward<float, true>}, {backward<bf16, false>, backward<bf16, true>}}};

}  // namespace gptcore::cuda
