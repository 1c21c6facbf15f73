#include "core/arena.h"
#include "core/parallel.h"
#include "core/row_blocks.h"
#include "core/simd.h"
#include "kernels/layer_norm/layer_norm_body.h"

namespace gptcore {
namespace GPTCORE_ISA_NS {
namespace {

// Rows taken together. Their sums keep the adders busy, an add taking four cycles and two starting per cycle;
// and backward loads the weight, and loads and stores its gradients' partial sums, once for all of them.
constexpr int kGroup = 4;

template <class T>
GPTCORE_INLINE void add_rows(const T* x, const T* residual, T* h, int64_t width) {
  for_lanes(width, [&](int64_t c, int64_t n) {
    store_some(h + c, load_some(x + c, n) + load_some(residual + c, n), n);
  });
}

// kGroup rows or one: mean and variance in two passes, each row's sums in the same order in any group. Rows of
// bf16 are widened once, into `room`, for the three times they are read.
template <class T, int group>
GPTCORE_INLINE void forward_rows(const LayerNormForward& a, const float* weight, const float* bias,
                                 int64_t row, int64_t last, bool streams, float* room) {
  const int64_t width = a.width;  // a copy: stores of vectors might alias the arguments
  const T* x[group];
  const float* h[group];
  float *room_of[group], mean[group], rstd[group];
  for (int r = 0; r < group; ++r) {
    x[r] = static_cast<const T*>(a.x) + (row + r) * a.x_stride;
    if (a.residual) {
      T* sum = static_cast<T*>(a.h) + (row + r) * a.h_stride;
      add_rows(x[r], static_cast<const T*>(a.residual) + (row + r) * a.residual_stride, sum, width);
      x[r] = sum;
    }
    room_of[r] = room + r * width;
    if constexpr (sizeof(T) == 2) {
      h[r] = room_of[r];
    } else {
      h[r] = x[r];
    }
  }
  Vec sums[2][group] = {}, squares[2][group] = {};
  for_two_sums(width, [&](int64_t c, int64_t n, int s) {
#pragma GCC unroll 4
    for (int r = 0; r < group; ++r) {
      const Vec value = load_some(x[r] + c, n);
      if constexpr (sizeof(T) == 2) store_some(room_of[r] + c, value, n);
      sums[s][r] += value;
    }
  });
  for (int r = 0; r < group; ++r) mean[r] = reduce_add(sums[0][r] + sums[1][r]) / width;
  for_two_sums(width, [&](int64_t c, int64_t n, int s) {
#pragma GCC unroll 4
    for (int r = 0; r < group; ++r) {
      const Vec d = load_some(h[r] + c, n) - mean[r];
      squares[s][r] += n == kLanes ? d * d : keep_n(d * d, n, 0.0f);
    }
  });
  for (int r = 0; r < group; ++r) {
    const float variance = reduce_add(squares[0][r] + squares[1][r]) / width;
    rstd[r] = 1.0f / __builtin_sqrtf(variance + a.eps);
  }
  for (int r = 0; r < group; ++r) {
    const float *values = h[r], row_mean = mean[r], row_rstd = rstd[r];
    const int64_t here = row + r, next = here + group < last ? here + group : here;
    // Not h * rstd - mean * rstd, one FMA: where rstd is large that cancels.
    write_row(static_cast<T*>(a.y) + here * a.y_stride, static_cast<const T*>(a.x) + next * a.x_stride, width,
              streams, [&](int64_t c, int64_t n) {
                Vec value = (load_some(values + c, n) - row_mean) * row_rstd;
                if (weight) value *= load_some(weight + c, n);
                if (bias) value += load_some(bias + c, n);
                return value;
              });
    if (a.mean) a.mean[here] = mean[r];
    if (a.rstd) a.rstd[here] = rstd[r];
  }
}

template <class T>
void forward(const LayerNormForward& a) {
  const Scratch converted(
      a.bf16_weight || a.weight_offset != 0 ? static_cast<size_t>(2 * a.width) * sizeof(float) : 0);
  const float* weight = as_f32(a.weight, a.bf16_weight, a.width, converted.as<float>(), a.weight_offset);
  const float* bias = as_f32(a.bias, a.bf16_weight, a.width, converted.as<float>() + a.width);
  const int64_t element = sizeof(T);
  const bool streams = can_stream(a.y, a.y_stride * element, a.rows * a.width * element);
  parallel_ranges(a.rows, kGrainElements / a.width + 1, [&](int64_t row, int64_t last) {
    const Scratch widened(sizeof(T) == 2 ? static_cast<size_t>(kGroup * a.width) * sizeof(float) : 0);
    float* room = widened.as<float>();
    for (; row + kGroup <= last; row += kGroup) {
      forward_rows<T, kGroup>(a, weight, bias, row, last, streams, room);
    }
    for (; row < last; ++row) forward_rows<T, 1>(a, weight, bias, row, last, streams, room);
    if (streams) stream_fence();
  });
}

// dx = rstd * (g - mean(g) - xhat * mean(g * xhat)) + grad_h with g = grad_y * weight; adds the rows' part of
// dweight = sum grad_y * xhat and dbias = sum grad_y to the block's partial sums. A row's sums take the same
// order in a group of any size.
template <class T, int group>
GPTCORE_INLINE void backward_rows(const LayerNormBackward& a, const float* weight, int64_t row,
                                  float* dweight, float* dbias) {
  const int64_t width = a.width;
  const T *dy[group], *h[group], *dh[group];
  T* dx[group];
  float rstd[group], mean[group], mean_g[group], mean_gx[group];
  for (int r = 0; r < group; ++r) {
    dy[r] = static_cast<const T*>(a.grad_y) + (row + r) * a.grad_y_stride;
    h[r] = static_cast<const T*>(a.h) + (row + r) * a.h_stride;
    dh[r] = a.grad_h ? static_cast<const T*>(a.grad_h) + (row + r) * a.grad_h_stride : nullptr;
    dx[r] = static_cast<T*>(a.dx) + (row + r) * a.dx_stride;
    rstd[r] = a.rstd[row + r], mean[r] = a.mean[row + r];
  }
  Vec sums_g[group] = {}, sums_gx[group] = {};
  for_lanes(width, [&](int64_t c, int64_t n) {
    const Vec w = weight ? load_some(weight + c, n) : splat(1.0f);
#pragma GCC unroll 4
    for (int r = 0; r < group; ++r) {
      const Vec g = load_some(dy[r] + c, n) * w;  // lanes from n on are zero, so sums need no mask
      sums_g[r] += g;
      sums_gx[r] += g * (load_some(h[r] + c, n) - mean[r]);
    }
  });
  for (int r = 0; r < group; ++r) {
    mean_g[r] = reduce_add(sums_g[r]) / width;
    mean_gx[r] = reduce_add(sums_gx[r]) * rstd[r] / width;
  }
  for_lanes(width, [&](int64_t c, int64_t n) {
    const Vec w = weight ? load_some(weight + c, n) : splat(1.0f);
    Vec dw = dweight ? load_some(dweight + c, n) : Vec{}, db = dweight ? load_some(dbias + c, n) : Vec{};
#pragma GCC unroll 4
    for (int r = 0; r < group; ++r) {
      const Vec xhat = (load_some(h[r] + c, n) - mean[r]) * rstd[r], g = load_some(dy[r] + c, n);
      dw += g * xhat;
      db += g;
      Vec value = (g * w - mean_g[r] - xhat * mean_gx[r]) * rstd[r];
      if (dh[r]) value += load_some(dh[r] + c, n);
      store_some(dx[r] + c, value, n);
    }
    if (dweight) {
      store_some(dweight + c, dw, n);
      store_some(dbias + c, db, n);
    }
  });
}

template <class T>
void backward(const LayerNormBackward& a) {
  const Scratch converted(a.bf16_weight || a.weight_offset != 0 ? static_cast<size_t>(a.width) * sizeof(float)
                                                                : 0);
  const float* weight = as_f32(a.weight, a.bf16_weight, a.width, converted.as<float>(), a.weight_offset);
  const bool wants_sums = a.dweight || a.dbias;
  const int64_t block_rows = block_rows_of(a.rows), blocks = (a.rows + block_rows - 1) / block_rows;
  const Scratch scratch(wants_sums ? static_cast<size_t>(blocks * 2 * a.width) * sizeof(float) : 0);
  float* partials = scratch.as<float>();
  const auto block_body = [&](int64_t block) {
    float* dweight = wants_sums ? partials + block * 2 * a.width : nullptr;
    float* dbias = wants_sums ? dweight + a.width : nullptr;
    if (wants_sums) __builtin_memset(dweight, 0, static_cast<size_t>(2 * a.width) * sizeof(float));
    const int64_t end = (block + 1) * block_rows < a.rows ? (block + 1) * block_rows : a.rows;
    int64_t row = block * block_rows;
    for (; row + kGroup <= end; row += kGroup) backward_rows<T, kGroup>(a, weight, row, dweight, dbias);
    for (; row < end; ++row) backward_rows<T, 1>(a, weight, row, dweight, dbias);
  };
  const int64_t grain = kGrainElements / (a.width * block_rows) + 1;
  parallel_ranges(blocks, grain, [&](int64_t begin, int64_t end) {
    for (int64_t block = begin; block < end; ++block) block_body(block);
  });
  join_blocks(partials, 2 * a.width, blocks, a.width, a.dweight, a.bf16_dweight);
  join_blocks(partials + a.width, 2 * a.width, blocks, a.width, a.dbias, a.bf16_dweight);
}

}  // namespace

extern const LayerNormBodies layer_norm_bodies;
const LayerNormBodies layer_norm_bodies = {
    {forward<float>, forward<bf16>},
    {backward<float>, backward<bf16>},
};

}  // namespace GPTCORE_ISA_NS
}  // namespace gptcore
