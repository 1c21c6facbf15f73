// What a step over whole tensors and one over slices share: the cut of a matrix, and how options become numbers.
#pragma once

#include <algorithm>
#include <cmath>
#include <limits>

#include "core/isa.h"
#include "core/optimizer.h"
#include "kernels/adafactor/adafactor.h"
#include "kernels/adafactor/adafactor_body.h"

namespace gptcore {

GPTCORE_BODIES(AdafactorBodies, adafactor_bodies)

namespace {

// 512 KiB of f32: two such arrays stay in a core's second level of cache, and the sums of a chunk's columns are few
// beside it. At most 128 rows add up in f32.
constexpr int64_t kMatrixElements = 131072, kMatrixRows = 128, kMatrixCols = 4096;
// Columns of one task that turns sums into factors.
constexpr int64_t kFactorColumns = 1024;

// Columns and rows of a chunk of a matrix of so many columns.
inline int64_t chunk_cols(int64_t cols) { return std::max<int64_t>(1, std::min(cols, kMatrixCols)); }
inline int64_t chunk_rows(int64_t cols) { return std::min(kMatrixRows, kMatrixElements / chunk_cols(cols)); }

// What gradients are multiplied with.
inline double factor_of(const AdafactorOptions& o, double norm) {
  const double clip = clip_factor(o.max_norm, norm);
  return clip / o.grad_scale;
}

inline void check_options(const Checker& check, const AdafactorOptions& o) {
  const auto finite = [&](double value, const char* name) {
    check.number(value >= 0 && std::isfinite(value), name, value, "a finite number, 0 or more");
  };
  finite(o.step_size, "step_size");
  finite(o.eps1, "eps[0]");
  finite(o.eps2, "eps[1]");
  check.number(o.beta2 >= 0 && o.beta2 < 1, "beta2", o.beta2, "a number in [0, 1)");
  check.number(o.beta1 >= 0 && o.beta1 < 1, "beta1", o.beta1, "a number in [0, 1)");
  check.number(o.grad_scale > 0 && std::isfinite(o.grad_scale), "grad_scale", o.grad_scale,
               "a finite number above 0");
  if (o.max_norm) check.number(*o.max_norm > 0, "max_norm", *o.max_norm, "a number above 0, or None");
  if (o.grad_norm) finite(*o.grad_norm, "grad_norm");
  if (o.clip_threshold) {
    check.number(*o.clip_threshold > 0, "clip_threshold", *o.clip_threshold, "a number above 0, or None");
  }
}

// RMS(p) and RMS(U) of a tensor of `size` elements into the factors of p and of g / sqrt(V); k is in the latter.
inline void set_scale(const AdafactorOptions& o, double k, double weight_decay, double size, double param_sum,
                      double update_sum, AdafactorTensor* t) {
  double step = o.step_size;
  if (o.scale_parameter) step *= std::max(o.eps2, std::sqrt(param_sum / size));
  const double decay = o.scaled_decay ? weight_decay * step : weight_decay;
  t->keep = static_cast<float>(1.0 - decay);
  if (o.clip_threshold) step /= std::max(1.0, k * std::sqrt(update_sum / size) / *o.clip_threshold);
  t->scale = static_cast<float>((o.maximize ? -step : step) * k);
}

inline AdafactorNumbers numbers_of(const AdafactorOptions& o, double k) {
  AdafactorNumbers a;
  a.beta2 = o.beta2;
  a.rest2 = 1.0 - o.beta2;
  a.beta1 = static_cast<float>(o.beta1);
  a.rest1 = static_cast<float>(1.0 - o.beta1);
  a.square_factor = k * k;
  a.square_added = o.eps_added ? o.eps1 : 0.0;
  a.mean_floor = o.eps_added ? 0.0 : o.eps1;
  a.root_limit = o.eps_added ? std::numeric_limits<float>::infinity() : static_cast<float>(1.0 / o.eps1);
  return a;
}

}  // namespace
}  // namespace gptcore
