// Checks of what attention over a cache in pages takes beside attention's own arguments.
#pragma once

#include "core/check.h"
#include "kernels/attention/attention.h"
#include "kernels/attention/attention_body.h"

namespace gptcore {

// Fills pages and keys. The tables are read where they do not lie `elsewhere`, on another device.
void check_pages(const Checker& check, const TensorView& k, const TensorView& table,
                 const TensorView& lengths, bool elsewhere, AttentionProblem* p);

// Refuses the options that there are not.
void check_paged_options(const Checker& check, const AttentionOptions& options);

}  // namespace gptcore
