#include "core/arena.h"
#include "core/parallel.h"
#include "core/row_blocks.h"
#include "core/simd.h"
#include "kernels/layer_norm/layer_norm_body.h"

namespace gptcore {
namespace GPTCORE_ISA_NS {
namespace {

// Rows taken together: they share loads of the weight, and in backward loads and stores of its gradients' partial
// sums; and while one row's sum is being finished, the other's keep the adders busy.
constexpr int kForwardGroup = 2, kBackwardGroup = 4;

template <class T>
GPTCORE_INLINE void add_rows(const T* x, const T* residual, T* h, int64_t width) {
  for_pairs(
      width, [&](int64_t c, int) { store_pair(h + c, plus(load_pair(x + c), load_pair(residual + c))); },
      [&](int64_t c, int64_t n) { store_some(h + c, load_some(x + c, n) + load_some(residual + c, n), n); });
}

// Running sums of a row: two vectors for even pairs, two for odd ones.
struct RowSums {
  Vec pairs[2][2] = {};
  __attribute__((always_inline)) float total() const {
    return reduce_add((pairs[0][0] + pairs[1][0]) + (pairs[0][1] + pairs[1][1]));
  }
};

// Mean and variance of `group` rows, in two passes; each row's sums take the same order in any group.
template <class T, int group>
GPTCORE_INLINE void moments(const T* const (&h)[group], int64_t width, float (&mean)[group],
                            float (&variance)[group]) {
  RowSums sums[group], squares[group];
  for_pairs(
      width,
      [&](int64_t c, int s) {
        for (int r = 0; r < group; ++r) {
          const Pair v = load_any_order(h[r] + c);
          sums[r].pairs[s][0] += v.low, sums[r].pairs[s][1] += v.high;
        }
      },
      [&](int64_t c, int64_t n) {
        for (int r = 0; r < group; ++r) sums[r].pairs[0][0] += load_some(h[r] + c, n);
      });
  for (int r = 0; r < group; ++r) mean[r] = sums[r].total() / width;
  for_pairs(
      width,
      [&](int64_t c, int s) {
        for (int r = 0; r < group; ++r) {
          const Pair v = load_any_order(h[r] + c);
          const Vec low = v.low - mean[r], high = v.high - mean[r];
          squares[r].pairs[s][0] += low * low, squares[r].pairs[s][1] += high * high;
        }
      },
      [&](int64_t c, int64_t n) {
        for (int r = 0; r < group; ++r) {
          const Vec d = load_some(h[r] + c, n) - mean[r];
          squares[r].pairs[0][0] += n == kLanes ? d * d : keep_n(d * d, n, 0.0f);
        }
      });
  for (int r = 0; r < group; ++r) variance[r] = squares[r].total() / width;
}

template <class T, int group>
GPTCORE_INLINE void forward_rows(const LayerNormForward& a, const float* weight, const float* bias,
                                 int64_t row, int64_t last, bool streams) {
  const int64_t width = a.width;  // a copy: stores of vectors might alias the arguments
  const T *h[group], *next[group];
  T* y[group];
  float mean[group], rstd[group];
  for (int r = 0; r < group; ++r) {
    const int64_t here = row + r, after = here + group < last ? here + group : here;
    h[r] = static_cast<const T*>(a.x) + here * a.x_stride;
    next[r] = static_cast<const T*>(a.x) + after * a.x_stride;
    y[r] = static_cast<T*>(a.y) + here * a.y_stride;
    if (a.residual) {
      T* sum = static_cast<T*>(a.h) + here * a.h_stride;
      add_rows(h[r], static_cast<const T*>(a.residual) + here * a.residual_stride, sum, width);
      h[r] = sum;
    }
  }
  moments<T, group>(h, width, mean, rstd);
  for (int r = 0; r < group; ++r) {
    rstd[r] = 1.0f / __builtin_sqrtf(rstd[r] + a.eps);
    if (a.mean) a.mean[row + r] = mean[r];
    if (a.rstd) a.rstd[row + r] = rstd[r];
  }
  // Not h * rstd - mean * rstd, one FMA: where rstd is large that cancels.
  for_pairs(
      width,
      [&](int64_t c, int) {
        const Pair w = load_pair(weight + c), b = load_pair(bias + c);
        for (int r = 0; r < group; ++r) {
          prefetch_pair(next[r] + c);
          const Pair v = load_pair(h[r] + c);
          write_pair(
              y[r] + c,
              {(v.low - mean[r]) * rstd[r] * w.low + b.low, (v.high - mean[r]) * rstd[r] * w.high + b.high},
              streams);
        }
      },
      [&](int64_t c, int64_t n) {
        const Vec w = load_some(weight + c, n), b = load_some(bias + c, n);
        for (int r = 0; r < group; ++r) {
          store_some(y[r] + c, (load_some(h[r] + c, n) - mean[r]) * rstd[r] * w + b, n);
        }
      });
}

template <class T>
void forward(const LayerNormForward& a) {
  const Scratch room(needs_copy(a.weight, a.bf16_weight, a.weight_offset) || !a.bias ? 2 * row_bytes(a.width)
                                                                                     : 0);
  const float* weight = factors(a.weight, a.bf16_weight, a.width, room.as<float>(), a.weight_offset);
  float* zeros = room.as<float>() + a.width;
  if (!a.bias) __builtin_memset(zeros, 0, row_bytes(a.width));
  const float* bias = a.bias ? as_f32(a.bias, a.bf16_weight, a.width, zeros) : zeros;
  const int64_t element = sizeof(T);
  const bool streams = can_stream(a.y, a.y_stride * element, a.rows * a.width * element);
  parallel_ranges(a.rows, kGrainElements / a.width + 1, [&](int64_t row, int64_t last) {
    for (; row + kForwardGroup <= last; row += kForwardGroup) {
      forward_rows<T, kForwardGroup>(a, weight, bias, row, last, streams);
    }
    for (; row < last; ++row) forward_rows<T, 1>(a, weight, bias, row, last, streams);
    if (streams) stream_fence();
  });
}

// mean(g) and mean(g * xhat) of `group` rows, with g = grad_y * weight; each row's sums take the same order in any
// group.
template <class T, int group>
GPTCORE_INLINE void gradient_means(const T* const (&dy)[group], const T* const (&h)[group],
                                   const float* weight, int64_t width, const float (&mean)[group],
                                   const float (&rstd)[group], float (&mean_g)[group],
                                   float (&mean_gx)[group]) {
  Vec sums_g[group][2] = {}, sums_gx[group][2] = {};
  for_pairs(
      width,
      [&](int64_t c, int) {
        const Pair w = load_pair(weight + c);
        for (int r = 0; r < group; ++r) {
          const Pair d = load_pair(dy[r] + c), v = load_pair(h[r] + c);
          const Vec low = d.low * w.low, high = d.high * w.high;
          sums_g[r][0] += low, sums_g[r][1] += high;
          sums_gx[r][0] += low * (v.low - mean[r]), sums_gx[r][1] += high * (v.high - mean[r]);
        }
      },
      [&](int64_t c, int64_t n) {
        const Vec w = load_some(weight + c, n);
        for (int r = 0; r < group; ++r) {
          const Vec g = load_some(dy[r] + c, n) * w;  // lanes from n on are zero, so sums need no mask
          sums_g[r][0] += g;
          sums_gx[r][0] += g * (load_some(h[r] + c, n) - mean[r]);
        }
      });
  for (int r = 0; r < group; ++r) {
    mean_g[r] = reduce_add(sums_g[r][0] + sums_g[r][1]) / width;
    mean_gx[r] = reduce_add(sums_gx[r][0] + sums_gx[r][1]) * rstd[r] / width;
  }
}

// dx = rstd * (g - mean(g) - xhat * mean(g * xhat)) + grad_h; adds the rows' part of dweight = sum grad_y * xhat and
// dbias = sum grad_y to the block's partial sums.
template <class T, int group>
GPTCORE_INLINE void backward_rows(const LayerNormBackward& a, const float* weight, int64_t row,
                                  float* dweight, float* dbias, bool streams) {
  const int64_t width = a.width;
  const T *dy[group], *h[group], *dh[group];
  T* dx[group];
  float rstd[group], mean[group], mean_g[group], mean_gx[group];
  const bool adds = a.grad_h;
  for (int r = 0; r < group; ++r) {
    dy[r] = static_cast<const T*>(a.grad_y) + (row + r) * a.grad_y_stride;
    h[r] = static_cast<const T*>(a.h) + (row + r) * a.h_stride;
    dh[r] = adds ? static_cast<const T*>(a.grad_h) + (row + r) * a.grad_h_stride : dy[r];
    dx[r] = static_cast<T*>(a.dx) + (row + r) * a.dx_stride;
    rstd[r] = a.rstd[row + r], mean[r] = a.mean[row + r];
  }
  gradient_means<T, group>(dy, h, weight, width, mean, rstd, mean_g, mean_gx);
  for_pairs(
      width,
      [&](int64_t c, int) {
        const Pair w = load_pair(weight + c);
        Pair dw = load_pair(dweight + c), db = load_pair(dbias + c);
        for (int r = 0; r < group; ++r) {
          const Pair v = load_pair(h[r] + c), g = load_pair(dy[r] + c);
          const Vec low = (v.low - mean[r]) * rstd[r], high = (v.high - mean[r]) * rstd[r];
          dw.low += g.low * low, dw.high += g.high * high;
          db.low += g.low, db.high += g.high;
          Pair out = {(g.low * w.low - mean_g[r] - low * mean_gx[r]) * rstd[r],
                      (g.high * w.high - mean_g[r] - high * mean_gx[r]) * rstd[r]};
          if (adds) out = plus(out, load_pair(dh[r] + c));
          write_pair(dx[r] + c, out, streams);
        }
        store_pair(dweight + c, dw);
        store_pair(dbias + c, db);
      },
      [&](int64_t c, int64_t n) {
        const Vec w = load_some(weight + c, n);
        Vec dw = load_some(dweight + c, n), db = load_some(dbias + c, n);
        for (int r = 0; r < group; ++r) {
          const Vec xhat = (load_some(h[r] + c, n) - mean[r]) * rstd[r], g = load_some(dy[r] + c, n);
          dw += g * xhat;
          db += g;
          Vec value = (g * w - mean_g[r] - xhat * mean_gx[r]) * rstd[r];
          if (adds) value += load_some(dh[r] + c, n);
          store_some(dx[r] + c, value, n);
        }
        store_some(dweight + c, dw, n);
        store_some(dbias + c, db, n);
      });
}

template <class T>
void backward(const LayerNormBackward& a) {
  const Scratch room(needs_copy(a.weight, a.bf16_weight, a.weight_offset) ? row_bytes(a.width) : 0);
  const float* weight = factors(a.weight, a.bf16_weight, a.width, room.as<float>(), a.weight_offset);
  const int64_t block_rows = block_rows_of(a.rows), blocks = (a.rows + block_rows - 1) / block_rows;
  const Scratch scratch(static_cast<size_t>(2 * blocks) * row_bytes(a.width));
  float* partials = scratch.as<float>();
  const int64_t element = sizeof(T);
  const bool streams = can_stream(a.dx, a.dx_stride * element, a.rows * a.width * element);
  const auto block_body = [&](int64_t block) {
    float *dweight = partials + block * 2 * a.width, *dbias = dweight + a.width;
    __builtin_memset(dweight, 0, 2 * row_bytes(a.width));
    const int64_t end = (block + 1) * block_rows < a.rows ? (block + 1) * block_rows : a.rows;
    int64_t row = block * block_rows;
    for (; row + kBackwardGroup <= end; row += kBackwardGroup) {
      backward_rows<T, kBackwardGroup>(a, weight, row, dweight, dbias, streams);
    }
    for (; row < end; ++row) backward_rows<T, 1>(a, weight, row, dweight, dbias, streams);
  };
  const int64_t grain = kGrainElements / (a.width * block_rows) + 1;
  parallel_ranges(blocks, grain, [&](int64_t begin, int64_t end) {
    for (int64_t block = begin; block < end; ++block) block_body(block);
    if (streams) stream_fence();
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
