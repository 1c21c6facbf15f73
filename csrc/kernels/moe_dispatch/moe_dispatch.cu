// Tokens to their experts and back on CUDA: copies of rows, 16 bytes a thread, each row of a result written once. Rows
// and offsets are read where they lie; one that points outside is left out.
#include "core/cuda/launch.cuh"
#include "core/cuda/pack.cuh"
#include "core/cuda/reduce.cuh"
#include "kernels/moe_dispatch/moe_dispatch_body.h"

namespace gptcore::cuda {
namespace {

constexpr int kThreads = 256;

// Blocks of `across` threads along a row's packs by `down` rows.
struct Tile {
  unsigned across, down;
};
template <class T>
Tile tile_of(int64_t width) {
  const int64_t packs = (width + kPackElements<T> - 1) / kPackElements<T>;
  unsigned across = 1;
  while (across < packs && across < kThreads / 2) across *= 2;
  return {across, kThreads / across};
}

Launch launch_of(Tile tile, int64_t rows) {
  return {dim3(static_cast<unsigned>((rows + tile.down - 1) / tile.down)), dim3(tile.across, tile.down)};
}

// Elements from column c on, zeros past the width; in one access where rows are packs and this one is whole.
template <class T>
struct Columns {
  int64_t width;
  bool packed;

  __device__ __forceinline__ bool whole(int64_t c) const { return packed && c + kPackElements<T> <= width; }
  __device__ __forceinline__ Pack<T> read(const T* row, int64_t c) const {
    if (whole(c)) return *reinterpret_cast<const Pack<T>*>(row + c);
    Pack<T> pack{};
#pragma unroll
    for (int i = 0; i < kPackElements<T>; ++i) {
      if (c + i < width) pack.at[i] = row[c + i];
    }
    return pack;
  }
  __device__ __forceinline__ void write(T* row, int64_t c, const Pack<T>& pack) const {
    if (whole(c)) {
      *reinterpret_cast<Pack<T>*>(row + c) = pack;
      return;
    }
#pragma unroll
    for (int i = 0; i < kPackElements<T>; ++i) {
      if (c + i < width) row[c + i] = pack.at[i];
    }
  }
};

template <class T>
__device__ __forceinline__ int64_t first_column() {
  return static_cast<int64_t>(threadIdx.x) * kPackElements<T>;
}
template <class T>
__device__ __forceinline__ int64_t column_step() {
  return static_cast<int64_t>(blockDim.x) * kPackElements<T>;
}

// Row `row` becomes zeros unless it is in use.
template <class T>
__device__ __forceinline__ void clear_unused(const Columns<T>& columns, T* sorted, int64_t stride,
                                             int64_t row, int64_t all, const int32_t* used) {
  if (row >= all || row < *used) return;
  const Pack<T> zeros{};
  for (int64_t c = first_column<T>(); c < columns.width; c += column_step<T>()) {
    columns.write(sorted + row * stride, c, zeros);
  }
}

// A token's row read once and written to the places of its choices; behind the tokens come the rows to clear.
template <class T>
__global__ void __launch_bounds__(kThreads) dispatch_rows(const MoeDispatch a, const bool packed) {
  const int64_t n = static_cast<int64_t>(blockIdx.x) * blockDim.y + threadIdx.y;
  const Columns<T> columns{a.width, packed};
  T* sorted = static_cast<T*>(a.sorted);
  if (n >= a.count) return clear_unused(columns, sorted, a.sorted_stride, n - a.count, a.all, a.used_rows);
  const T* token = static_cast<const T*>(a.tokens) + n * a.token_stride;
  for (int64_t c = first_column<T>(); c < a.width; c += column_step<T>()) {
    const Pack<T> pack = columns.read(token, c);
    for (int64_t k = 0; k < a.choices; ++k) {
      const int64_t row = a.rows[n * a.choices + k];
      if (row >= 0 && row < a.all) columns.write(sorted + row * a.sorted_stride, c, pack);
    }
  }
}

constexpr int kBatch = 4;  // choices whose rows are read at the same time

template <class T>
__global__ void __launch_bounds__(kThreads) combine_rows(const MoeCombine a, const bool packed) {
  const int64_t n = static_cast<int64_t>(blockIdx.x) * blockDim.y + threadIdx.y;
  if (n >= a.count) return;
  const Columns<T> columns{a.width, packed};
  const int32_t* rows = a.rows + n * a.choices;
  const float* gates = a.gates ? a.gates + n * a.choices : nullptr;
  for (int64_t c = first_column<T>(); c < a.width; c += column_step<T>()) {
    float sum[kPackElements<T>] = {};
    for (int64_t first = 0; first < a.choices; first += kBatch) {
      Pack<T> pack[kBatch];
      float gate[kBatch];
      bool there[kBatch];
#pragma unroll
      for (int j = 0; j < kBatch; ++j) {
        const int64_t k = first + j, row = k < a.choices ? rows[k] : -1;
        there[j] = row >= 0 && row < a.all;
        pack[j] =
            there[j] ? columns.read(static_cast<const T*>(a.sorted) + row * a.sorted_stride, c) : Pack<T>{};
        gate[j] = there[j] && gates ? gates[k] : 1.0f;
      }
#pragma unroll
      for (int j = 0; j < kBatch; ++j) {
#pragma unroll
        for (int i = 0; i < kPackElements<T>; ++i) {
          sum[i] = there[j] ? fmaf(to_float(pack[j].at[i]), gate[j], sum[i]) : sum[i];
        }
      }
    }
    Pack<T> result;
#pragma unroll
    for (int i = 0; i < kPackElements<T>; ++i) result.at[i] = from_float<T>(sum[i]);
    columns.write(static_cast<T*>(a.tokens) + n * a.token_stride, c, result);
  }
}

// A warp a choice: the gradient of its row, and of its gate by a sum in an order that the width alone fixes.
template <class T>
__device__ __forceinline__ void choice_gradients(const MoeCombineBackward& a, int64_t at, bool packed) {
  const Columns<T> columns{a.width, packed};
  const int64_t row = a.rows[at];
  if (row < 0 || row >= a.all) {
    if (lane() == 0) a.dgates[at] = 0.0f;
    return;
  }
  const T* dtoken = static_cast<const T*>(a.dtokens) + at / a.choices * a.token_stride;
  const T* sorted = static_cast<const T*>(a.sorted) + row * a.sorted_stride;
  T* dsorted = static_cast<T*>(a.dsorted) + row * a.dsorted_stride;
  const float gate = a.gates[at];
  float dot = 0.0f;
#pragma unroll 2
  for (int64_t c = int64_t{lane()} * kPackElements<T>; c < a.width; c += kWarp * kPackElements<T>) {
    const Pack<T> d = columns.read(dtoken, c), y = columns.read(sorted, c);
    Pack<T> scaled;
#pragma unroll
    for (int i = 0; i < kPackElements<T>; ++i) {
      dot = fmaf(to_float(d.at[i]), to_float(y.at[i]), dot);
      scaled.at[i] = from_float<T>(to_float(d.at[i]) * gate);
    }
    columns.write(dsorted, c, scaled);
  }
  dot = warp_reduce(dot);
  if (lane() == 0) a.dgates[at] = dot;
}

template <class T>
__global__ void __launch_bounds__(kThreads) combine_gradients(const MoeCombineBackward a, const bool packed) {
  const int64_t at = static_cast<int64_t>(blockIdx.x) * blockDim.y + threadIdx.y;
  if (at < a.count * a.choices) return choice_gradients<T>(a, at, packed);
  const Columns<T> columns{a.width, packed};
  clear_unused(columns, static_cast<T*>(a.dsorted), a.dsorted_stride, at - a.count * a.choices, a.all,
               a.used_rows);
}

template <class T>
void dispatch(const MoeDispatch& a) {
  const bool packed = can_pack<T>(a.tokens, a.token_stride) && can_pack<T>(a.sorted, a.sorted_stride);
  launch<&dispatch_rows<T>>(launch_of(tile_of<T>(a.width), a.count + a.all), a, packed);
}

template <class T>
void combine(const MoeCombine& a) {
  const bool packed = can_pack<T>(a.tokens, a.token_stride) && can_pack<T>(a.sorted, a.sorted_stride);
  launch<&combine_rows<T>>(launch_of(tile_of<T>(a.width), a.count), a, packed);
}

template <class T>
void combine_backward(const MoeCombineBackward& a) {
  const bool packed = can_pack<T>(a.dtokens, a.token_stride) && can_pack<T>(a.sorted, a.sorted_stride) &&
                      can_pack<T>(a.dsorted, a.dsorted_stride);
  launch<&combine_gradients<T>>(launch_of({kWarp, kThreads / kWarp}, a.count * a.choices + a.all), a, packed);
}

}  // namespace

GPTCORE_CUDA_BODIES(MoeDispatchBodies, moe_dispatch_bodies) = {
    {dispatch<float>, dispatch<bf16>},
    {combine<float>, combine<bf16>},
    {combine_backward<float>, combine_backward<bf16>}};

}  // namespace gptcore::cuda
