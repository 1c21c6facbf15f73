#include "core/arena.h"
#include "core/parallel.h"
#include "core/row_blocks.h"
#include "core/simd.h"
#include "kernels/rms_norm/rms_norm_body.h"

namespace gptcore {
namespace GPTCORE_ISA_NS {
namespace {

// Backward takes this many rows together: the weight is loaded, and its gradient's partial sum loaded and
// stored, once for all of them.
constexpr int kGroup = 4;

// h = x + residual, stored, and the sum of its squares: four running sums, an add takes 4 cycles and two
// start per cycle. Lanes beyond the row are zero and add nothing.
template <class T>
GPTCORE_INLINE float square_sum(const T* x, const T* residual, T* h, int64_t width) {
  Vec sums[4] = {};
  const auto take = [&](int64_t c, int64_t n) {
    Vec value = load_some(x + c, n);
    if (residual) {
      store_some(h + c, value + load_some(residual + c, n), n);
      value = load_some(h + c, n);
    }
    return value * value;
  };
  int64_t c = 0;
  for (; c + 4 * kLanes <= width; c += 4 * kLanes) {
    for (int s = 0; s < 4; ++s) sums[s] += take(c + s * kLanes, kLanes);
  }
  for (; c + kLanes <= width; c += kLanes) sums[0] += take(c, kLanes);
  if (c < width) sums[1] += take(c, width - c);
  return reduce_add((sums[0] + sums[1]) + (sums[2] + sums[3]));
}

template <class T>
void forward(const RmsNormForward& a) {
  const float per_width = 1.0f / a.width;
  const Scratch converted(a.bf16_weight ? static_cast<size_t>(a.width) * sizeof(float) : 0);
  const float* weight = as_f32(a.weight, a.bf16_weight, a.width, converted.as<float>());
  parallel_ranges(a.rows, kGrainElements / a.width + 1, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      const T* x = static_cast<const T*>(a.x) + row * a.x_stride;
      T* sum = a.residual ? static_cast<T*>(a.h) + row * a.h_stride : nullptr;
      const T* residual = a.residual ? static_cast<const T*>(a.residual) + row * a.residual_stride : nullptr;
      const float mean = square_sum(x, residual, sum, a.width) * per_width;
      const float rstd = 1.0f / __builtin_sqrtf(mean + a.eps);
      const T* h = a.residual ? sum : x;
      T* y = static_cast<T*>(a.y) + row * a.y_stride;
      for_lanes(a.width, [&](int64_t c, int64_t n) {
        Vec value = load_some(h + c, n) * rstd;
        if (weight) value *= load_some(weight + c, n);
        store_some(y + c, value, n);
      });
      if (a.rstd) a.rstd[row] = rstd;
    }
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
  const Scratch converted(a.bf16_weight ? static_cast<size_t>(a.width) * sizeof(float) : 0);
  const float* weight = as_f32(a.weight, a.bf16_weight, a.width, converted.as<float>());
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
