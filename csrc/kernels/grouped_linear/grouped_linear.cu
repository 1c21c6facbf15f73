// The experts' products on CUDA: a grid of as many blocks as run at the same time, which take tiles of all groups in
// turn. Groups' sizes are read on the device alone.
#include "kernels/grouped_linear/grouped_fma.cuh"
#include "kernels/grouped_linear/grouped_mma.cuh"
#include "kernels/grouped_linear/grouped_sm90.h"

namespace gptcore::cuda {
namespace {

template <class Tile>
int64_t tiles_of(const GroupedRowsDevice& a) {
  const int64_t across = (a.width + Tile::kSize - 1) / Tile::kSize;
  return a.rows == 0 ? 0 : RowTiles<Tile::kSize>::most(a.experts, a.rows) * across;
}
template <class Tile>
int64_t tiles_of(const GroupedWeightDevice& a) {
  const int64_t down = (a.outer + Tile::kSize - 1) / Tile::kSize,
                across = (a.inner + Tile::kSize - 1) / Tile::kSize;
  return a.experts * down * across;
}

int64_t table_bytes(const GroupedRowsDevice& a) { return RowTiles<1>::shared_bytes(a.experts); }
int64_t table_bytes(const GroupedWeightDevice&) { return 0; }

// A grid for at most so many tiles.
template <class Tile, class Product>
Launch launch_of(const Product& a) {
  const int64_t at_once = int64_t{Tile::kBlocks} * limits().multiprocessors, tiles = tiles_of<Tile>(a);
  return {dim3(static_cast<unsigned>(tiles < at_once ? tiles : at_once)), dim3(Tile::kThreads),
          Tile::kBytes + table_bytes(a)};
}

template <class T>
bool packed_in(const GroupedRowsDevice& a) {
  return can_pack<T>(a.in, a.in_stride) && can_pack<T>(a.weight, a.depth_lines ? a.depth : a.width);
}
template <class T>
bool packed_in(const GroupedWeightDevice& a) {
  return can_pack<T>(a.dy, a.dy_stride) && can_pack<T>(a.x, a.x_stride);
}

// Whether there are large tiles for every multiprocessor, twice: with fewer, small ones finish sooner.
template <class Product>
bool is_large(const Product& a) {
  return tiles_of<FmaTile<8>>(a) >= 2 * int64_t{limits().multiprocessors};
}

template <int kPer>
void rows_by_fma(const GroupedRowsDevice& a) {
  const bool packed = packed_in<float>(a), packed_out = can_pack<float>(a.out, a.out_stride);
  const Launch l = launch_of<FmaTile<kPer>>(a);
  a.depth_lines ? launch<&multiply_rows_fma<kPer, true>>(l, a, packed, packed_out)
                : launch<&multiply_rows_fma<kPer, false>>(l, a, packed, packed_out);
}

void rows_f32(const GroupedRowsDevice& a) { is_large(a) ? rows_by_fma<8>(a) : rows_by_fma<4>(a); }

void rows_bf16(const GroupedRowsDevice& a) {
  const bool packed = packed_in<bf16>(a), packed_out = can_pack<bf16>(a.out, a.out_stride);
  if (multiply_rows_sm90(a, packed_out)) return;
  a.depth_lines ? launch<&multiply_rows_mma<true, bf16>>(launch_of<MmaTile>(a), a, packed, packed_out)
                : launch<&multiply_rows_mma<false, bf16>>(launch_of<MmaTile>(a), a, packed, packed_out);
}

template <int kPer>
void weight_by_fma(const GroupedWeightDevice& a) {
  const bool packed = packed_in<float>(a), packed_out = can_pack<float>(a.dweight, a.inner);
  launch<&multiply_weight_fma<kPer>>(launch_of<FmaTile<kPer>>(a), a, packed, packed_out);
}

void weight_f32(const GroupedWeightDevice& a) { is_large(a) ? weight_by_fma<8>(a) : weight_by_fma<4>(a); }

void weight_bf16(const GroupedWeightDevice& a) {
  const bool packed = packed_in<bf16>(a);
  const bool packed_out =
      a.f32_out ? can_pack<float>(a.dweight, a.inner) : can_pack<bf16>(a.dweight, a.inner);
  if (multiply_weight_sm90(a, packed_out)) return;
  launch<&multiply_weight_mma<bf16>>(launch_of<MmaWeightTile>(a), a, packed, packed_out);
}

// --- dbias -----------------------------------------------------------------------------------------------------

constexpr int kSumWarps = 8, kSumColumns = 2 * kWarp;

// 64 columns of one group: each warp every eighth row, then the warps' sums in their order.
template <class T>
__global__ void __launch_bounds__(kSumWarps* kWarp) sum_rows(const GroupedBiasDevice a) {
  float* room = shared_memory<float>();
  const int64_t expert = blockIdx.y, column = static_cast<int64_t>(blockIdx.x) * kSumColumns + lane();
  const GroupRows group = rows_of_group(a.offsets, expert, a.experts, a.rows);
  const bool first = column < a.outer, second = column + kWarp < a.outer;
  const T* dy = static_cast<const T*>(a.dy) + column;
  float sums[2] = {};
#pragma unroll 4
  for (int64_t r = group.begin + warp(); r < group.end; r += kSumWarps) {
    sums[0] += first ? to_float(dy[r * a.dy_stride]) : 0.0f;
    sums[1] += second ? to_float(dy[r * a.dy_stride + kWarp]) : 0.0f;
  }
  room[warp() * kSumColumns + lane()] = sums[0], room[warp() * kSumColumns + kWarp + lane()] = sums[1];
  __syncthreads();
  const int own = static_cast<int>(threadIdx.x);
  const int64_t to = static_cast<int64_t>(blockIdx.x) * kSumColumns + own;
  if (own >= kSumColumns || to >= a.outer) return;
  float sum = 0.0f;
  for (int w = 0; w < kSumWarps; ++w) sum += room[w * kSumColumns + own];
  if (a.f32_out) {
    static_cast<float*>(a.dbias)[expert * a.outer + to] = sum;
  } else {
    static_cast<T*>(a.dbias)[expert * a.outer + to] = from_float<T>(sum);
  }
}

template <class T>
void bias(const GroupedBiasDevice& a) {
  const Launch l{dim3(static_cast<unsigned>((a.outer + kSumColumns - 1) / kSumColumns),
                      static_cast<unsigned>(a.experts)),
                 dim3(kSumWarps * kWarp), kSumWarps * kSumColumns * 4};
  launch<&sum_rows<T>>(l, a);
}

}  // namespace

GPTCORE_CUDA_BODIES(GroupedDeviceBodies, grouped_device_bodies) = {
    {rows_f32, rows_bf16}, {weight_f32, weight_bf16}, {bias<float>, bias<bf16>}};

}  // namespace gptcore::cuda
