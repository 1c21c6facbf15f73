#include "core/arena.h"
#include "core/parallel.h"
#include "core/row_blocks.h"
#include "core/simd.h"
#include "kernels/rms_norm/rms_norm_body.h"

namespace gptcore {
namespace GPTCORE_ISA_NS {
namespace {

// Rows taken together: they share loads of the weight, and in backward loads and stores of its gradient's partial
// sum; and while one row's sum is being finished, the other's keep the adders busy.
constexpr int kForwardGroup = 2, kBackwardGroup = 4;

// The reciprocal root mean squares of `group` rows, each row's sum in the same order in any group. With a residual
// h = x + residual is stored on the way.
template <class T, int group>
GPTCORE_INLINE void norms(const T* const (&x)[group], const T* const (&residual)[group], T* const (&h)[group],
                          bool adds, int64_t width, float eps, float (&rstd)[group]) {
  Vec squares[group][2][2] = {};
  for_pairs(
      width,
      [&](int64_t c, int s) {
        for (int r = 0; r < group; ++r) {
          const T* row = x[r];
          if (adds) {
            store_pair(h[r] + c, plus(load_pair(x[r] + c), load_pair(residual[r] + c)));
            row = h[r];  // the sum as it was rounded
          }
          const Pair v = load_any_order(row + c);
          squares[r][s][0] += v.low * v.low, squares[r][s][1] += v.high * v.high;
        }
      },
      [&](int64_t c, int64_t n) {
        for (int r = 0; r < group; ++r) {
          const T* row = x[r];
          if (adds) {
            store_some(h[r] + c, load_some(x[r] + c, n) + load_some(residual[r] + c, n), n);
            row = h[r];
          }
          const Vec v = load_some(row + c, n);  // lanes from n on are zero, so the sum needs no mask
          squares[r][0][0] += v * v;
        }
      });
  for (int r = 0; r < group; ++r) {
    const Vec sum = (squares[r][0][0] + squares[r][1][0]) + (squares[r][0][1] + squares[r][1][1]);
    rstd[r] = 1.0f / __builtin_sqrtf(reduce_add(sum) / width + eps);
  }
}

template <class T, int group>
GPTCORE_INLINE void forward_rows(const RmsNormForward& a, const float* weight, int64_t row, int64_t last,
                                 bool streams) {
  const int64_t width = a.width;  // a copy: stores of vectors might alias the arguments
  const T *x[group], *residual[group] = {}, *h[group], *next[group];
  T *sum[group] = {}, *y[group];
  float rstd[group];
  for (int r = 0; r < group; ++r) {
    const int64_t here = row + r, after = here + group < last ? here + group : here;
    x[r] = h[r] = static_cast<const T*>(a.x) + here * a.x_stride;
    next[r] = static_cast<const T*>(a.x) + after * a.x_stride;
    y[r] = static_cast<T*>(a.y) + here * a.y_stride;
    if (!a.residual) continue;
    residual[r] = static_cast<const T*>(a.residual) + here * a.residual_stride;
    h[r] = sum[r] = static_cast<T*>(a.h) + here * a.h_stride;
  }
  norms<T, group>(x, residual, sum, a.residual != nullptr, width, a.eps, rstd);
  for (int r = 0; a.rstd && r < group; ++r) a.rstd[row + r] = rstd[r];
  for_pairs(
      width,
      [&](int64_t c, int) {
        const Pair w = load_pair(weight + c);
        for (int r = 0; r < group; ++r) {
          prefetch_pair(next[r] + c);
          const Pair v = load_pair(h[r] + c);
          write_pair(y[r] + c, {v.low * rstd[r] * w.low, v.high * rstd[r] * w.high}, streams);
        }
      },
      [&](int64_t c, int64_t n) {
        const Vec w = load_some(weight + c, n);
        for (int r = 0; r < group; ++r) store_some(y[r] + c, load_some(h[r] + c, n) * rstd[r] * w, n);
      });
}

template <class T>
void forward(const RmsNormForward& a) {
  const Scratch room(needs_copy(a.weight, a.bf16_weight, a.weight_offset) ? row_bytes(a.width) : 0);
  const float* weight = factors(a.weight, a.bf16_weight, a.width, room.as<float>(), a.weight_offset);
  const int64_t element = sizeof(T);
  const bool streams = can_stream(a.y, a.y_stride * element, a.rows * a.width * element);
  parallel_ranges(a.rows, kGrainElements / a.width + 1, [&](int64_t row, int64_t last) {
    for (; row + kForwardGroup <= last; row += kForwardGroup) {
      forward_rows<T, kForwardGroup>(a, weight, row, last, streams);
    }
    for (; row < last; ++row) forward_rows<T, 1>(a, weight, row, last, streams);
    if (streams) stream_fence();
  });
}

// dx = rstd * (g - xhat * mean(g * xhat)) + grad_h with g = grad_y * weight; adds the rows' part of dweight =
// sum grad_y * xhat to the block's partial sums. A row's sums take the same order in a group of any size.
template <class T, int group>
GPTCORE_INLINE void backward_rows(const RmsNormBackward& a, const float* weight, int64_t row, float* dweight,
                                  bool streams) {
  const int64_t width = a.width;
  const bool adds = a.grad_h;
  const T *dy[group], *h[group], *dh[group];
  T* dx[group];
  float rstd[group], mean[group];
  Vec sums[group][2] = {};
  for (int r = 0; r < group; ++r) {
    dy[r] = static_cast<const T*>(a.grad_y) + (row + r) * a.grad_y_stride;
    h[r] = static_cast<const T*>(a.h) + (row + r) * a.h_stride;
    dh[r] = adds ? static_cast<const T*>(a.grad_h) + (row + r) * a.grad_h_stride : nullptr;
    dx[r] = static_cast<T*>(a.dx) + (row + r) * a.dx_stride;
    rstd[r] = a.rstd[row + r];
  }
  for_pairs(
      width,
      [&](int64_t c, int) {
        const Pair w = load_pair(weight + c);
        for (int r = 0; r < group; ++r) {
          const Pair g = load_pair(dy[r] + c), v = load_pair(h[r] + c);
          sums[r][0] += g.low * w.low * v.low, sums[r][1] += g.high * w.high * v.high;
        }
      },
      [&](int64_t c, int64_t n) {
        const Vec w = load_some(weight + c, n);
        for (int r = 0; r < group; ++r) sums[r][0] += load_some(dy[r] + c, n) * w * load_some(h[r] + c, n);
      });
  for (int r = 0; r < group; ++r) mean[r] = reduce_add(sums[r][0] + sums[r][1]) * rstd[r] / width;
  for_pairs(
      width,
      [&](int64_t c, int) {
        const Pair w = load_pair(weight + c);
        Pair dw = load_pair(dweight + c);
        for (int r = 0; r < group; ++r) {
          const Pair v = load_pair(h[r] + c), g = load_pair(dy[r] + c);
          const Vec low = v.low * rstd[r], high = v.high * rstd[r];
          dw.low += g.low * low, dw.high += g.high * high;
          Pair out = {(g.low * w.low - low * mean[r]) * rstd[r],
                      (g.high * w.high - high * mean[r]) * rstd[r]};
          if (adds) out = plus(out, load_pair(dh[r] + c));
          write_pair(dx[r] + c, out, streams);
        }
        store_pair(dweight + c, dw);
      },
      [&](int64_t c, int64_t n) {
        const Vec w = load_some(weight + c, n);
        Vec dw = load_some(dweight + c, n);
        for (int r = 0; r < group; ++r) {
          const Vec xhat = load_some(h[r] + c, n) * rstd[r], g = load_some(dy[r] + c, n);
          dw += g * xhat;
          Vec value = (g * w - xhat * mean[r]) * rstd[r];
          if (adds) value += load_some(dh[r] + c, n);
          store_some(dx[r] + c, value, n);
        }
        store_some(dweight + c, dw, n);
      });
}

template <class T>
void backward(const RmsNormBackward& a) {
  const Scratch room(needs_copy(a.weight, a.bf16_weight, a.weight_offset) ? row_bytes(a.width) : 0);
  const float* weight = factors(a.weight, a.bf16_weight, a.width, room.as<float>(), a.weight_offset);
  const int64_t block_rows = block_rows_of(a.rows), blocks = (a.rows + block_rows - 1) / block_rows;
  const Scratch scratch(static_cast<size_t>(blocks) * row_bytes(a.width));
  float* partials = scratch.as<float>();
  const int64_t element = sizeof(T);
  const bool streams = can_stream(a.dx, a.dx_stride * element, a.rows * a.width * element);
  const int64_t grain = kGrainElements / (a.width * block_rows) + 1;
  parallel_ranges(blocks, grain, [&](int64_t begin, int64_t end) {
    for (int64_t block = begin; block < end; ++block) {
      float* dweight = partials + block * a.width;
      __builtin_memset(dweight, 0, row_bytes(a.width));
      int64_t row = block * block_rows;
      const int64_t last = row + block_rows < a.rows ? row + block_rows : a.rows;
      for (; row + kBackwardGroup <= last; row += kBackwardGroup) {
        backward_rows<T, kBackwardGroup>(a, weight, row, dweight, streams);
      }
      for (; row < last; ++row) backward_rows<T, 1>(a, weight, row, dweight, streams);
    }
    if (streams) stream_fence();
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
