// What a .cu file owes to the op it serves: a table of launchers under the name that <op>.cpp gave it, known to the
// module that carries it. Plain C++.
//
//   GPTCORE_CUDA_BODIES(LayerNormBodies, layer_norm_bodies) = {{forward<float>, forward<bf16>}, ...};
//
// at the scope of namespace gptcore::cuda.
#pragma once

#include "core/device_link.h"

namespace gptcore::cuda {

// The tables of this module, in no order.
const DeviceBodies* all_bodies();

struct RegisteredBodies : DeviceBodies {
  RegisteredBodies(const char* name, const void* bodies);
};

// Where the call at hand runs, and memory for it; empty until _C has connected itself.
DeviceCall current_call();
DeviceMemory caller_memory();
void connect(const DeviceLink& link);

}  // namespace gptcore::cuda

#define GPTCORE_CUDA_BODIES(Bodies, name)                        \
  extern const Bodies name;                                      \
  static const RegisteredBodies registered_##name{#name, &name}; \
  const Bodies name
