// Fetching ahead in loops over arrays that lie in memory. The processor's own prefetching stops at each page of 4 KiB
// and follows few arrays at once.
#pragma once

#include "core/simd.h"

namespace gptcore {
namespace GPTCORE_ISA_NS {

// `bytes` behind `at`, into the given level of cache. The second has room for more lines under way.
template <int64_t bytes, int level = 1>
GPTCORE_INLINE void fetch_ahead(const void* at) {
  __builtin_prefetch(static_cast<const char*>(at) + bytes, 0, level == 1 ? 3 : 2);
}

}  // namespace GPTCORE_ISA_NS
}  // namespace gptcore
