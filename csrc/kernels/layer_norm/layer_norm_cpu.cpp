#include "core/arena.h"
#include "core/parallel.h"
#include "core/simd.h"
#include "kernels/layer_norm/layer_norm_body.h"

namespace gptcore {
namespace GPTCORE_ISA_NS {
namespace {

// An add takes 4 cycles and two start per cycle: four running sums keep a row's reduction near load speed
// while the compiler still holds everything in registers on AVX2.
constexpr int kSums = 4;

// Below this many elements a parallel loop costs more than it saves.
constexpr int64_t kGrainElements = 16384;

// Backward takes this many rows together: the weight is loaded, and its gradients' partial sums loaded and
// stored, once for all of them; and their sums keep the adders busy.
constexpr int kGroup = 4;

// Rows per block of the weight gradients' sums. Fixed by the shape alone, so the bits do not know the thread
// count; at most 64 blocks, so that partial sums stay a small part of the traffic.
int64_t block_rows_of(int64_t rows) {
  const int64_t by_count = (rows + 63) / 64;
  return by_count < 16 ? 16 : by_count;
}

// Sum over c of term(offset, lanes): kSums running vectors, joined in a fixed tree.
template <class F>
GPTCORE_INLINE float row_sum(int64_t width, const F& term) {
  Vec sums[kSums] = {};
  int64_t c = 0;
  for (; c + kSums * kLanes <= width; c += kSums * kLanes) {
    for (int s = 0; s < kSums; ++s) sums[s] += term(c + s * kLanes, int64_t{kLanes});
  }
  for (; c + kLanes <= width; c += kLanes) sums[0] += term(c, int64_t{kLanes});
  if (c < width) sums[1] += term(c, width - c);
  return reduce_add((sums[0] + sums[1]) + (sums[2] + sums[3]));
}

template <class T>
GPTCORE_INLINE void add_rows(const T* x, const T* residual, T* h, int64_t width) {
  for_lanes(width, [&](int64_t c, int64_t n) {
    store_some(h + c, load_some(x + c, n) + load_some(residual + c, n), n);
  });
}

template <class T, class W>
GPTCORE_INLINE void normalise(const T* h, const W* weight, const W* bias, float mean, float rstd, T* y,
                              int64_t width) {
  // Not h * rstd - mean * rstd, one FMA: where rstd is large that cancels.
  for_lanes(width, [&](int64_t c, int64_t n) {
    Vec value = (load_some(h + c, n) - mean) * rstd;
    if (weight) value *= load_some(weight + c, n);
    if (bias) value += load_some(bias + c, n);
    store_some(y + c, value, n);
  });
}

template <class T, class W>
void forward(const LayerNormForward& a) {
  const int64_t grain = kGrainElements / a.width + 1;
  parallel_ranges(a.rows, grain, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      const T* h = static_cast<const T*>(a.x) + row * a.x_stride;
      if (a.residual) {
        T* sum = static_cast<T*>(a.h) + row * a.h_stride;
        add_rows(h, static_cast<const T*>(a.residual) + row * a.residual_stride, sum, a.width);
        h = sum;
      }
      const float mean =
          row_sum(a.width, [&](int64_t c, int64_t n) { return load_some(h + c, n); }) / a.width;
      const float variance = row_sum(a.width,
                                     [&](int64_t c, int64_t n) {
                                       const Vec d = load_some(h + c, n) - mean;
                                       return n == kLanes ? d * d : keep_n(d * d, n, 0.0f);
                                     }) /
                             a.width;
      const float rstd = 1.0f / __builtin_sqrtf(variance + a.eps);
      normalise(h, static_cast<const W*>(a.weight), static_cast<const W*>(a.bias), mean, rstd,
                static_cast<T*>(a.y) + row * a.y_stride, a.width);
      if (a.mean) a.mean[row] = mean;
      if (a.rstd) a.rstd[row] = rstd;
    }
  });
}

// dx = rstd * (g - mean(g) - xhat * mean(g * xhat)) + grad_h with g = grad_y * weight; adds the rows' part of
// dweight = sum grad_y * xhat and dbias = sum grad_y to the block's partial sums. A row's sums take the same
// order in a group of any size.
template <class T, class W, int group>
GPTCORE_INLINE void backward_rows(const LayerNormBackward& a, int64_t row, float* dweight, float* dbias) {
  const W* weight = static_cast<const W*>(a.weight);
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
  for_lanes(a.width, [&](int64_t c, int64_t n) {
    const Vec w = weight ? load_some(weight + c, n) : splat(1.0f);
    for (int r = 0; r < group; ++r) {
      const Vec g = load_some(dy[r] + c, n) * w;  // lanes from n on are zero, so sums need no mask
      sums_g[r] += g;
      sums_gx[r] += g * (load_some(h[r] + c, n) - mean[r]);
    }
  });
  for (int r = 0; r < group; ++r) {
    mean_g[r] = reduce_add(sums_g[r]) / a.width;
    mean_gx[r] = reduce_add(sums_gx[r]) * rstd[r] / a.width;
  }
  for_lanes(a.width, [&](int64_t c, int64_t n) {
    const Vec w = weight ? load_some(weight + c, n) : splat(1.0f);
    Vec dw = dweight ? load_some(dweight + c, n) : Vec{}, db = dweight ? load_some(dbias + c, n) : Vec{};
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

// Adds the blocks' partial sums in block order and stores them in the wanted type.
template <class Out>
void join_blocks(const float* partials, int64_t blocks, int64_t width, void* out_or_null) {
  Out* out = static_cast<Out*>(out_or_null);
  if (!out) return;
  parallel_ranges(width, 4096, [&](int64_t begin, int64_t end) {
    for_lanes(end - begin, [&](int64_t c, int64_t n) {
      Vec sum = {};
      for (int64_t block = 0; block < blocks; ++block)
        sum += load_some(partials + 2 * block * width + begin + c, n);
      store_some(out + begin + c, sum, n);
    });
  });
}

template <class T, class W>
void backward(const LayerNormBackward& a) {
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
    for (; row + kGroup <= end; row += kGroup) backward_rows<T, W, kGroup>(a, row, dweight, dbias);
    for (; row < end; ++row) backward_rows<T, W, 1>(a, row, dweight, dbias);
  };
  const int64_t grain = kGrainElements / (a.width * block_rows) + 1;
  parallel_ranges(blocks, grain, [&](int64_t begin, int64_t end) {
    for (int64_t block = begin; block < end; ++block) block_body(block);
  });
  if (!wants_sums) return;
  if (a.f32_dweight) {
    join_blocks<float>(partials, blocks, a.width, a.dweight);
    join_blocks<float>(partials + a.width, blocks, a.width, a.dbias);
  } else {
    join_blocks<W>(partials, blocks, a.width, a.dweight);
    join_blocks<W>(partials + a.width, blocks, a.width, a.dbias);
  }
}

}  // namespace

extern const LayerNormBodies layer_norm_bodies;
const LayerNormBodies layer_norm_bodies = {
    {{forward<float, float>, forward<float, bf16>}, {forward<bf16, float>, forward<bf16, bf16>}},
    {{backward<float, float>, backward<float, bf16>}, {backward<bf16, float>, backward<bf16, bf16>}},
};

}  // namespace GPTCORE_ISA_NS
}  // namespace gptcore
