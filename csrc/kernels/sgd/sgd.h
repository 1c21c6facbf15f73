// Stochastic gradient descent with momentum over many tensors, clipped by the global norm of the gradients, which
// the caller has from grad_norm; torch.optim.SGD's update rule (Sutskever et al. 2013 with the learning rate
// outside the momentum).
//
//   s = 1 / grad_scale, negative with maximize
//   k = s * min(1, max_norm / (norm + 1e-6))          (k = s without max_norm)
//   g' = k g + weight_decay p
//   b = momentum b + (1 - dampening) g'               (b = g' where first: b is not read)
//   u = b, with nesterov g' + momentum b              (u = g' without momentum_buffers)
//   p = p - lr u                                      copy = bf16(p)
//
// Shapes   per tensor: params, grads, momentum_buffers, copies of one shape, contiguous.
// Types    params, momentum_buffers f32; grads f32 or bf16, each its own; copies bf16.
// None     momentum_buffers, copies (empty lists); max_norm.
// Aliasing none between tensors.
// Bits     equal for any thread count.
// CUDA     lr, grad_scale and grad_norm may be tensors there, which kernels alone read: nothing waits for the device. A
//          norm that is not finite means that nothing is written.
// Cost     one read of g, one read and write of p (and b), one write of copy: 12 bytes a parameter in f32, 20
//          with momentum; 10 flops.
// Errors   ValueError or TypeError on any violated line above, before anything is written.
#pragma once

#include <optional>
#include <vector>

#include "core/step_number.h"

namespace gptcore {

// weight_decay and first have one entry per tensor; first is not looked at without momentum_buffers.
struct SgdLists {
  const std::vector<TensorView>&params, &grads, &momentum_buffers, &copies;
  const std::vector<double>& weight_decay;
  const std::vector<bool>& first;
};

struct SgdOptions {
  StepNumber lr = 1e-3;
  double momentum = 0, dampening = 0;
  bool nesterov = false, maximize = false;
  std::optional<double> max_norm;
  StepNumber grad_scale = 1.0;
};

// norm: None where nobody took one, without max_norm. Returns as grad_norm does.
std::pair<double, bool> sgd(const SgdLists& lists, const SgdOptions& options,
                            const std::optional<StepNumber>& norm, const StepResult& result = {});

}  // namespace gptcore
