// How exactly kernels of another device multiply f32 numbers where their tensor cores could do it faster: one setting for
// the process, read when an op is called. The processor always multiplies them as they are.
//
//   ieee   with errors as of f32 sums
//   tf32   operands rounded to 11 significant bits, f32 sums
#pragma once

namespace gptcore {

const char* fp32_precision();

// ValueError for other names.
void set_fp32_precision(const char* name);

// Whether it is tf32.
bool tf32_products();

}  // namespace gptcore
