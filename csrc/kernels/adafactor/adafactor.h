// Adafactor (Shazeer, Stern 2018) over many tensors, with the choices in which its implementations differ.
//
// Per tensor, with N elements; where it is factored, of shape (..., n, m), each matrix on its own:
//
//   k = min(1, max_norm / (norm + 1e-6)) / grad_scale        norm: of all g / grad_scale together
//   G = k g                            q = G^2 (+ eps1 where eps_added)
//   factored     R_i = beta2 R_i + (1 - beta2) mean_j q_ij   C_j = beta2 C_j + (1 - beta2) mean_i q_ij
//                V_ij = R_i C_j / mean_i R_i                 (eps_added)
//                V_ij = max(R_i C_j / max(mean_i R_i, eps1), eps1^2)      (else)
//   unfactored   V = beta2 V + (1 - beta2) q                 (and max(V, eps1^2) below where not eps_added)
//   U = G / sqrt(V)                    U = U / max(1, RMS(U) / clip_threshold)
//   a = step_size * max(eps2, RMS(p))                        (a = step_size without scale_parameter)
//   u = a U,   negative where maximize                       m = beta1 m + (1 - beta1) u,  u = m
//   p = p (1 - weight_decay) - u                             (weight_decay times a where scaled_decay)
//   copy = bf16(p)                     RMS(x) = sqrt(sum x^2 / N)
//
// Shapes   params, grads, variances, exp_avgs, copies of one shape per tensor; row_vars (..., n, 1), col_vars
//          (..., 1, m). Per tensor either variances, or row_vars and col_vars; all contiguous.
// Types    params and states f32; grads f32 or bf16, each its own; copies bf16.
// None     entries of row_vars, col_vars, variances; exp_avgs (an empty list, as copies); clip_threshold,
//          max_norm.
// Aliasing none between tensors.
// Result   (norm, found_inf). Where a gradient is inf or NaN, found_inf is true and nothing is written.
// Sums     f32 over at most 64 vectors or 128 rows, f64 beyond, in an order that the shapes fix. Squares are
//          f32: gradients beyond 1e19 make their factors infinite (as in torch); the norm takes them in f64.
//          RMS(U) of factored tensors comes from sums over columns, see adafactor_cpu.cpp, where no V is held up.
// Bits     equal for any thread count.
// Cost     reads g twice and p twice, writes p: 20 bytes a parameter in f32, of which the second reading of p is from
//          the last level of cache. One reading of g more where RMS(U) has to be summed by elements: a max_norm whose
//          norm is not given, matrices of more than 4,096 columns, a V below eps1^2. About 12 flops.
// CUDA     step_size, beta2, decay_factor, grad_scale and grad_norm may be tensors there, which kernels alone read, the
//          first two of one f64 for each parameter as well; the result is written there. A norm that is not finite means
//          that nothing is written and no count moves on. Sums in orders of its own, which the shapes fix.
// Errors   ValueError or TypeError on any violated line above, before anything is written.
#pragma once

#include <optional>
#include <utility>
#include <vector>

#include "core/step_number.h"

namespace gptcore {

struct AdafactorOptions {
  double step_size = 1e-2, beta2 = 0.0, beta1 = 0.0;
  double eps1 = 1e-30, eps2 = 1e-3;
  bool eps_added = true;
  std::optional<double> clip_threshold;
  bool scale_parameter = true, scaled_decay = false, maximize = false;
  std::optional<double> max_norm;
  double grad_scale = 1.0;
  std::optional<double> grad_norm;  // known already, of more tensors than these
};

// Those of them that may be tensors, as the caller gives them, and where counts and the result go.
struct AdafactorGiven {
  StepNumber step_size, beta2;
  StepNumber decay_factor = 1.0;  // of all weight decays
  StepNumber grad_scale = 1.0;
  std::optional<StepNumber> grad_norm;
  std::vector<TensorView> steps;  // f32 counts, one more where the update is applied; may be empty
  StepResult result;
};

struct AdafactorLists {
  const std::vector<TensorView>&params, &grads, &row_vars, &col_vars, &variances, &exp_avgs, &copies;
};

// weight_decay has one entry per tensor. What `given` has takes the place of the options of its name. Returns as
// grad_norm does.
std::pair<double, bool> adafactor(const AdafactorLists& lists, const std::vector<double>& weight_decay,
                                  const AdafactorOptions& options, const AdafactorGiven& given);
std::pair<double, bool> adafactor(const AdafactorLists& lists, const std::vector<double>& weight_decay,
                                  const AdafactorOptions& options);

}  // namespace gptcore
