// How the products meet memory: what the next ones want is fetched while the present ones are made, since with few rows
// for each expert the weights take longer to come than to multiply, and large results are stored past the caches.
#pragma once

#include "core/gemm_tile.h"
#include "kernels/grouped_linear/grouped_linear_body.h"

namespace gptcore {
namespace GPTCORE_ISA_NS {
namespace {

// Stretches of a matrix, asked into L2 a few lines at a time.
struct Fetch {
  const char* at;
  int64_t stride, bytes, count, at_once, offset;
};

GPTCORE_INLINE void fetch_some(Fetch& next) {
  for (int64_t i = 0; i < next.at_once && next.count > 0; ++i) {
    __builtin_prefetch(next.at + next.offset, 0, 2);
    next.offset += kLine;
    if (next.offset >= next.bytes) next.at += next.stride, next.offset = 0, --next.count;
  }
}

// Whether results go past the caches, whose rows must begin with a line for that.
GPTCORE_INLINE bool whole_lines(const GroupProduct& p) {
  const int64_t row = p.out_stride * (p.f32_out ? 4 : 2);
  return p.past_caches && ((reinterpret_cast<uintptr_t>(p.out) | static_cast<uintptr_t>(row)) & 63) == 0;
}

// Columns [column, + width) by depth [depth, + depths) of p.b, spread over `turns`.
GPTCORE_INLINE Fetch fetch_of(const GroupProduct& p, int64_t column, int64_t width, int64_t depth,
                              int64_t depths, int64_t turns) {
  const int64_t element = size_of(p.dtype), line = p.b_depth_lines ? column : depth;
  const int64_t first = p.b_depth_lines ? depth : column, length = p.b_depth_lines ? depths : width;
  Fetch next{static_cast<const char*>(p.b) + (line * p.b_stride + first) * element,
             p.b_stride * element,
             length * element,
             p.b_depth_lines ? width : depths,
             0,
             0};
  if (length > 0) next.at_once = ceil_div(next.count * ceil_div(next.bytes, kLine), turns);
  return next;
}

}  // namespace
}  // namespace GPTCORE_ISA_NS
}  // namespace gptcore
