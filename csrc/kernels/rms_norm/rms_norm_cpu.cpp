#include "core/arena.h"
#include "core/parallel.h"
#include "core/row_blocks.h"
#include "core/simd.h"
#include "kernels/rms_norm/rms_norm_body.h"

namespace gptcore {
namespace GPTCORE_ISA_NS {
namespace {

// Rows taken together. Their sums keep the adders busy, an add taking four cycles and two starting per cycle;
// and the weight is loaded, in backward its gradient's partial sum loaded and stored, once for all of them.
constexpr int kGroup = 4;

// kGroup rows or one, each row's sum in the same order in any group. With a residual h = x + residual is stored
// on the way.
template <class T, int group>
GPTCORE_INLINE void forward_rows(const RmsNormForward& a, const float* weight, int64_t row, int64_t last,
                                 bool streams) {
  const int64_t width = a.width;  // a copy: stores of vectors might alias the arguments
  const T *x[group], *residual[group], *h[group];
  T* sum[group];
  for (int r = 0; r < group; ++r) {
    x[r] = h[r] = static_cast<const T*>(a.x) + (row + r) * a.x_stride;
    if (!a.residual) continue;
    residual[r] = static_cast<const T*>(a.residual) + (row + r) * a.residual_stride;
    h[r] = sum[r] = static_cast<T*>(a.h) + (row + r) * a.h_stride;
  }
  const bool adds = a.residual;
  Vec squares[2][group] = {};
  for_two_sums(width, [&](int64_t c, int64_t n, int s) {
#pragma GCC unroll 4
    for (int r = 0; r < group; ++r) {
      Vec value = load_some(x[r] + c, n);  // lanes from n on are zero, so the sum needs no mask
      if (adds) {
        store_some(sum[r] + c, value + load_some(residual[r] + c, n), n);
        value = load_some(h[r] + c, n);
      }
      squares[s][r] += value * value;
    }
  });
  for (int r = 0; r < group; ++r) {
    const T* values = h[r];
    const float mean = reduce_add(squares[0][r] + squares[1][r]) / width;
    const float rstd = 1.0f / __builtin_sqrtf(mean + a.eps);
    const int64_t here = row + r, next = here + group < last ? here + group : here;
    write_row(static_cast<T*>(a.y) + here * a.y_stride, static_cast<const T*>(a.x) + next * a.x_stride, width,
              streams, [&](int64_t c, int64_t n) {
                const Vec value = load_some(values + c, n) * rstd;
                return weight ? value * load_some(weight + c, n) : value;
              });
    if (a.rstd) a.rstd[here] = rstd;
  }
}

template <class T>
void forward(const RmsNormForward& a) {
  const Scratch converted(a.bf16_weight || a.weight_offset != 0 ? static_cast<size_t>(a.width) * sizeof(float)
                                                                : 0);
  const float* weight = as_f32(a.weight, a.bf16_weight, a.width, converted.as<float>(), a.weight_offset);
  const int64_t element = sizeof(T);
  const bool streams = can_stream(a.y, a.y_stride * element, a.rows * a.width * element);
  parallel_ranges(a.rows, kGrainElements / a.width + 1, [&](int64_t row, int64_t last) {
    for (; row + kGroup <= last; row += kGroup) forward_rows<T, kGroup>(a, weight, row, last, streams);
    for (; row < last; ++row) forward_rows<T, 1>(a, weight, row, last, streams);
    if (streams) stream_fence();
  });
}

// dx = rstd * (g - xhat * mean(g * xhat)) + grad_h with g = grad_y * weight; adds the rows' part of dweight =
// sum grad_y * xhat to the block's partial sums. A row's sums take the same order in a group of any size.
template <class T, int group>
GPTCORE_INLINE void backward_rows(const RmsNormBackward& a, const float* weight, int64_t row,
                                  float* dweight) {
  const T *dy[group], *h[group], *dh[group];
  T* dx[group];
  float rstd[group], mean[group];
  for (int r = 0; r < group; ++r) {
    dy[r] = static_cast<const T*>(a.grad_y) + (row + r) * a.grad_y_stride;
    h[r] = static_cast<const T*>(a.h) + (row + r) * a.h_stride;
    dh[r] = a.grad_h ? static_cast<const T*>(a.grad_h) + (row + r) * a.grad_h_stride : nullptr;
    dx[r] = static_cast<T*>(a.dx) + (row + r) * a.dx_stride;
    rstd[r] = a.rstd[row + r];
  }
  Vec sums[2][group] = {};
  const auto take = [&](int64_t c, int64_t n, int s) {
    const Vec w = weight ? load_some(weight + c, n) : splat(1.0f);
    for (int r = 0; r < group; ++r) sums[s][r] += load_some(dy[r] + c, n) * w * load_some(h[r] + c, n);
  };
  int64_t c = 0;
  for (; c + 2 * kLanes <= a.width; c += 2 * kLanes) take(c, kLanes, 0), take(c + kLanes, kLanes, 1);
  if (c + kLanes <= a.width) take(c, kLanes, 0), c += kLanes;
  if (c < a.width) take(c, a.width - c, 1);
  for (int r = 0; r < group; ++r) mean[r] = reduce_add(sums[0][r] + sums[1][r]) * rstd[r] / a.width;
  for_lanes(a.width, [&](int64_t c, int64_t n) {
    const Vec w = weight ? load_some(weight + c, n) : splat(1.0f);
    Vec dw = dweight ? load_some(dweight + c, n) : Vec{};
    for (int r = 0; r < group; ++r) {
      const Vec xhat = load_some(h[r] + c, n) * rstd[r], g = load_some(dy[r] + c, n);
      dw += g * xhat;
      Vec value = (g * w - xhat * mean[r]) * rstd[r];
      if (dh[r]) value += load_some(dh[r] + c, n);
      store_some(dx[r] + c, value, n);
    }
    if (dweight) store_some(dweight + c, dw, n);
  });
}

template <class T>
void backward(const RmsNormBackward& a) {
  const Scratch converted(a.bf16_weight || a.weight_offset != 0 ? static_cast<size_t>(a.width) * sizeof(float)
                                                                : 0);
  const float* weight = as_f32(a.weight, a.bf16_weight, a.width, converted.as<float>(), a.weight_offset);
  const int64_t block_rows = block_rows_of(a.rows), blocks = (a.rows + block_rows - 1) / block_rows;
  const Scratch scratch(a.dweight ? static_cast<size_t>(blocks * a.width) * sizeof(float) : 0);
  float* partials = scratch.as<float>();
  const int64_t grain = kGrainElements / (a.width * block_rows) + 1;
  parallel_ranges(blocks, grain, [&](int64_t begin, int64_t end) {
    for (int64_t block = begin; block < end; ++block) {
      float* dweight = a.dweight ? partials + block * a.width : nullptr;
      if (dweight) __builtin_memset(dweight, 0, static_cast<size_t>(a.width) * sizeof(float));
      int64_t row = block * block_rows;
      const int64_t last = row + block_rows < a.rows ? row + block_rows : a.rows;
      for (; row + kGroup <= last; row += kGroup) backward_rows<T, kGroup>(a, weight, row, dweight);
      for (; row < last; ++row) backward_rows<T, 1>(a, weight, row, dweight);
    }
  });
  join_blocks(partials, a.width, blocks, a.width, a.dweight, a.bf16_dweight);
}

}  // namespace

extern const RmsNormBodies rms_norm_bodies;
const RmsNormBodies rms_norm_bodies = {
    {forward<float>, forward<bf16>},
    {backward<float>, backward<bf16>},
};

}  // namespace GPTCORE_ISA_NS
}  // namespace gptcore
