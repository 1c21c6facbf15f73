// The backward pass of norms over rows; see norm_forward.cuh.
//
//   g = dy (weight + offset)      xhat = (h - mean) rstd
//   dx = rstd (g - mean(g) - xhat mean(g xhat)) + dh            (no mean(g) unless centred)
//   dweight = sum over rows of dy xhat      dbias = sum over rows of dy
//
// Blocks stay for many rows: each reads dy and h once, the next row on its way while this one is at work, and sums its
// rows' part of dweight and dbias in registers. A second kernel adds the blocks' parts in order; one block needs none.
#pragma once

#include "core/cuda/column_sums.cuh"
#include "core/cuda/norm_plan.h"
#include "core/cuda/row_packs.cuh"
#include "core/cuda/row_sums.cuh"
#include "core/cuda/row_walk.cuh"
#include "core/cuda/scratch.h"

namespace gptcore::cuda {

struct NormBackward {
  const void *grad_y, *grad_h, *h, *weight;  // grad_h, weight may be null
  const float *mean, *rstd;                  // mean is null unless centred
  void *dx, *dweight, *dbias;                // dweight, dbias may be null
  int64_t rows, width, grad_y_stride, grad_h_stride, h_stride, dx_stride;
  float offset;
  float* parts;  // (blocks, 2, width): null where one block has all rows
  float share;   // 1 / width
  int cluster;
  bool bf16_weight, bf16_dweight, packed;
};

// What a row's elements are computed from, in one pack.
template <int kCount>
struct NormPack {
  float dy[kCount], g[kCount], xhat[kCount];
};

// weight + offset from column c on.
template <int kCount>
__device__ __forceinline__ void load_weight(const NormBackward& a, int64_t c, int left, bool packed,
                                            float (&w)[kCount]) {
  load_vector(a.weight, a.bf16_weight, c, left, packed, 1.0f, w);
#pragma unroll
  for (int i = 0; i < kCount; ++i) w[i] += a.offset;
}

template <int kCount>
__device__ __forceinline__ NormPack<kCount> norm_pack(const uint4& dy, const uint4& h,
                                                      const float (&w)[kCount], float mean, float rstd) {
  NormPack<kCount> p;
  unpack(dy, p.dy), unpack(h, p.xhat);
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    p.g[i] = p.dy[i] * w[i];
    p.xhat[i] = (p.xhat[i] - mean) * rstd;
  }
  return p;
}

// Sums of g xhat and of g.
template <bool centred, int kCount>
__device__ __forceinline__ void add_products(const NormPack<kCount>& p, float (&sums)[centred ? 2 : 1]) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    sums[0] += p.g[i] * p.xhat[i];
    if constexpr (centred) sums[1] += p.g[i];
  }
}

// `means` times -rstd: what xhat is multiplied by, and what is added.
template <class T, bool centred, int kCount>
__device__ __forceinline__ void store_dx(const NormBackward& a, const NormPack<kCount>& p,
                                         const float (&means)[centred ? 2 : 1], float rstd,
                                         const uint4& grad_h, int64_t row, int64_t c, int left, bool packed) {
  float v[kCount], dh[kCount];
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    if constexpr (centred) {
      v[i] = fmaf(p.g[i], rstd, fmaf(p.xhat[i], means[0], means[1]));
    } else {
      v[i] = fmaf(p.g[i], rstd, p.xhat[i] * means[0]);
    }
  }
  if (a.grad_h) {
    unpack(grad_h, dh);
#pragma unroll
    for (int i = 0; i < kCount; ++i) v[i] += dh[i];
  }
  store_some(static_cast<T*>(a.dx) + row * a.dx_stride + c, v, left, packed);
}

// Lanes of a warp with different rows of the same columns: all get the sums over them.
template <int kCount>
__device__ __forceinline__ void add_lanes(float (&sums)[kCount]) {
  for (int step = kWarp / 2; step >= static_cast<int>(blockDim.x); step /= 2) {
#pragma unroll
    for (int i = 0; i < kCount; ++i) sums[i] += __shfl_xor_sync(kFullMask, sums[i], step);
  }
}

// The block's sums over its groups of threads, in order, and where they go: `out` (null: nowhere) or the block's row of
// the parts. Threads of a group have `lanes` times kSums elements.
template <int kSums>
__device__ __forceinline__ void store_column_sums(const NormBackward& a, float (&sums)[kSums], int elements,
                                                  int first, int step, int part, int64_t block, void* out,
                                                  float* room) {
  const int lanes = static_cast<int>(blockDim.x), threads = lanes * static_cast<int>(blockDim.y);
  const int thread = static_cast<int>(threadIdx.y) * lanes + static_cast<int>(threadIdx.x);
  const int together = lanes < kWarp ? kWarp : lanes;  // threads with sums of their own rows
  if (lanes < kWarp) add_lanes(sums);
  __syncthreads();  // the room held something else
#pragma unroll
  for (int i = 0; i < kSums; ++i) room[i * threads + thread] = sums[i];
  __syncthreads();
  for (int at = thread; at < lanes * kSums; at += threads) {
    const int i = at / lanes, x = at - i * lanes;
    float sum = room[i * threads + x];
    for (int group = together; group < threads; group += together) sum += room[i * threads + group + x];
    const int64_t c = first + (i / elements) * step + x * elements + i % elements;
    if (c >= a.width) continue;
    if (a.parts) {
      a.parts[(2 * block + part) * a.width + c] = sum;
    } else {
      store_column(out, a.bf16_dweight, c, sum);
    }
  }
}

template <class T, bool centred, int kPacks, bool packed>
__global__ void __launch_bounds__(norm_backward_threads(kPacks), 1) norm_backward_rows(const NormBackward a) {
  constexpr int kCount = kPackElements<T>, kSums = kPacks * kCount;
  float* room = shared_memory<float>();
  const RowWalk walk(a.cluster);
  const int first = walk.first<kCount>(), step = walk.step<kCount>(), width = static_cast<int>(a.width);
  uint4 dy[kPacks], h[kPacks], next_dy[kPacks] = {}, next_h[kPacks] = {}, grad_h[kPacks] = {};
  float next_mean = 0.0f, next_rstd = 0.0f;
  const auto fetch = [&](int64_t row) {
    const int left = row < a.rows ? width - first : 0;
    load_packs<T>(static_cast<const T*>(a.grad_y) + row * a.grad_y_stride + first, left, step, packed,
                  next_dy);
    load_packs<T>(static_cast<const T*>(a.h) + row * a.h_stride + first, left, step, packed, next_h);
    if (centred) next_mean = row < a.rows ? a.mean[row] : 0.0f;
    next_rstd = row < a.rows ? a.rstd[row] : 0.0f;
  };
  if (packed) fetch(walk.mine);
  float w[kPacks][kCount], dweight[kSums] = {}, dbias[kSums] = {};
#pragma unroll
  for (int k = 0; k < kPacks; ++k) load_weight(a, first + k * step, width - first - k * step, packed, w[k]);
  int turn = 0;
  for (int64_t row = walk.mine; row + walk.leader < a.rows; row += walk.stride, turn ^= 1) {
    const int left = row < a.rows ? width - first : 0;
    if (!packed) fetch(row);  // one by one, there are no registers for the row after it
    const float mean = next_mean, rstd = next_rstd;
#pragma unroll
    for (int k = 0; k < kPacks; ++k) dy[k] = next_dy[k], h[k] = next_h[k];
    if (a.grad_h) {
      load_packs<T>(static_cast<const T*>(a.grad_h) + row * a.grad_h_stride + first, left, step, packed,
                    grad_h);
    }
    if (packed) fetch(row + walk.stride);
    float sums[centred ? 2 : 1] = {};
#pragma unroll
    for (int k = 0; k < kPacks; ++k) {
      if (left <= k * step) continue;
      const auto p = norm_pack<kCount>(dy[k], h[k], w[k], mean, rstd);
      add_products<centred>(p, sums);
#pragma unroll
      for (int i = 0; i < kCount; ++i) {
        dweight[k * kCount + i] += p.dy[i] * p.xhat[i];
        if constexpr (centred) dbias[k * kCount + i] += p.dy[i];
      }
      if constexpr (kSums > 16 || !packed) forget_elements(dy[k]), forget_elements(h[k]);
    }
    row_sums(sums, a.cluster, room + turn * kRowSumRoom<2>);
    for (float& sum : sums) sum *= -rstd * a.share;
#pragma unroll
    for (int k = 0; k < kPacks; ++k) {
      if (left <= k * step) continue;
      const auto p = norm_pack<kCount>(dy[k], h[k], w[k], mean, rstd);
      store_dx<T, centred>(a, p, sums, rstd, grad_h[k], row, first + k * step, left - k * step, packed);
    }
  }
  if (a.cluster > 1) cluster_sync();  // the others may still read this block's sums
  if (a.dweight)
    store_column_sums(a, dweight, kCount, walk.rank * walk.lanes * kCount, step, 0, walk.block, a.dweight,
                      room);
  if (centred && a.dbias)
    store_column_sums(a, dbias, kCount, walk.rank * walk.lanes * kCount, step, 1, walk.block, a.dbias, room);
}

// Rows of any width: read twice, and the sums over rows kept in the block's part.
template <class T, bool centred>
__global__ void __launch_bounds__(kNormThreads) norm_backward_wide(const NormBackward a) {
  constexpr int kCount = kPackElements<T>;
  constexpr int64_t kStep = kNormThreads * kCount;
  float* room = shared_memory<float>();
  const int64_t first = int64_t{threadIdx.x} * kCount;
  float* dweight = a.parts + 2 * int64_t{blockIdx.x} * a.width;
  float* dbias = dweight + a.width;
  int turn = 0;
  for (int64_t row = blockIdx.x; row < a.rows; row += gridDim.x, turn ^= 1) {
    const float mean = centred ? a.mean[row] : 0.0f, rstd = a.rstd[row];
    const auto pack_at = [&](int64_t c, int left) {
      const T* dy = static_cast<const T*>(a.grad_y) + row * a.grad_y_stride + c;
      const T* h = static_cast<const T*>(a.h) + row * a.h_stride + c;
      float w[kCount];
      load_weight(a, c, left, a.packed, w);
      return norm_pack<kCount>(load_raw(dy, left, a.packed), load_raw(h, left, a.packed), w, mean, rstd);
    };
    float sums[centred ? 2 : 1] = {};
    for (int64_t c = first; c < a.width; c += kStep) {
      const int left = left_of<T>(a.width, c);
      const auto p = pack_at(c, left);
      add_products<centred>(p, sums);
#pragma unroll
      for (int i = 0; i < kCount; ++i) {
        if (i >= left) continue;
        const bool begins = row == blockIdx.x;
        if (a.dweight) dweight[c + i] = (begins ? 0.0f : dweight[c + i]) + p.dy[i] * p.xhat[i];
        if (centred && a.dbias) dbias[c + i] = (begins ? 0.0f : dbias[c + i]) + p.dy[i];
      }
    }
    row_sums(sums, 1, room + turn * kRowSumRoom<2>);
    for (float& sum : sums) sum *= -rstd * a.share;
    for (int64_t c = first; c < a.width; c += kStep) {
      const int left = left_of<T>(a.width, c);
      uint4 grad_h = make_uint4(0, 0, 0, 0);
      if (a.grad_h)
        grad_h = load_raw(static_cast<const T*>(a.grad_h) + row * a.grad_h_stride + c, left, a.packed);
      store_dx<T, centred>(a, pack_at(c, left), sums, rstd, grad_h, row, c, left, a.packed);
    }
  }
}

template <class T, bool centred, bool packed>
void start_norm_backward_rows(const NormPlan& p, const Launch& l, const NormBackward& a) {
  switch (p.packs) {
    case 1:
      return launch<&norm_backward_rows<T, centred, 1, packed>>(l, a);
    case 2:
      return launch<&norm_backward_rows<T, centred, 2, packed>>(l, a);
    default:
      return launch<&norm_backward_rows<T, centred, 3, packed>>(l, a);
  }
}

template <class T, bool centred>
void start_norm_backward(const NormPlan& p, const NormBackward& a) {
  const int64_t sums = int64_t{p.threads()} * p.packs * kPackElements<T>, room = 2 * kRowSumRoom<2>;
  const Launch l{dim3(static_cast<unsigned>(p.blocks)),
                 dim3(static_cast<unsigned>(p.lanes), static_cast<unsigned>(p.groups)),
                 (sums > room ? sums : room) * static_cast<int64_t>(sizeof(float)), p.cluster};
  if (p.packs == 0) return launch<&norm_backward_wide<T, centred>>(l, a);
  if (a.packed) return start_norm_backward_rows<T, centred, true>(p, l, a);
  start_norm_backward_rows<T, centred, false>(p, l, a);
}

template <class T, bool centred>
void norm_backward(NormBackward a) {
  a.packed = rows_are_packed<T>(a.width, a.grad_y, a.grad_y_stride, a.h, a.h_stride, a.dx, a.dx_stride) &&
             (!a.grad_h || rows_are_packed<T>(a.width, a.grad_h, a.grad_h_stride)) &&
             can_pack<float>(a.weight, 0);
  if (a.offset == 0.0f) a.offset = -0.0f;  // which leaves -0 as it is
  a.share = 1.0f / static_cast<float>(a.width);
  const NormPlan p =
      norm_backward_plan(a.rows, a.width, divided_up(a.width, kPackElements<T>), limits().arch);
  a.cluster = p.cluster;
  const int64_t blocks = p.blocks / p.cluster;
  const bool sums = a.dweight || a.dbias;
  if (!sums || (blocks == 1 && p.packs)) return start_norm_backward<T, centred>(p, a);
  const DeviceScratch scratch(blocks * 2 * a.width * static_cast<int64_t>(sizeof(float)));
  a.parts = scratch.as<float>();
  start_norm_backward<T, centred>(p, a);
  add_columns({a.parts, a.rows ? blocks : 0, 2 * a.width, a.width, {a.dweight, a.dbias}, a.bf16_dweight});
}

}  // namespace gptcore::cuda
