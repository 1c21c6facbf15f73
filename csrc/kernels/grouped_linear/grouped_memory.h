// How the products meet memory: what the next ones want is fetched while the present ones are made, since with few rows
// for each expert the weights take longer to come than to multiply, and large results are stored past the caches.
#pragma once

#include "core/gemm_tile.h"
#include "kernels/grouped_linear/grouped_linear_body.h"

namespace gptcore {
namespace GPTCORE_ISA_NS {
namespace {

// Stretches of a matrix, asked into L2 a few lines at a time, from several places in turn. Fetched one after the other
// all lines but the first would be asked for before the processor's own prefetching has them, and each hold one of the
// core's few line buffers, which loads from L2 need, while it comes from memory. Taking turns leaves each place's
// prefetching the time to run ahead.
constexpr int64_t kFetchPlaces = 8;

struct Fetch {
  const char* at;
  int64_t stride, bytes, count;  // stretches of each place
  int64_t apart, places;
  int64_t at_once, offset, place;
};

GPTCORE_INLINE void fetch_some(Fetch& next) {
  for (int64_t i = 0; i < next.at_once && next.count > 0; ++i) {
    __builtin_prefetch(next.at + next.place * next.apart + next.offset, 0, 2);
    if (++next.place < next.places) continue;
    next.place = 0;
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
  const int64_t stride = p.b_stride * element, count = p.b_depth_lines ? width : depths;
  if (length <= 0 || count <= 0) return {};
  const int64_t each = ceil_div(count, kFetchPlaces), places = ceil_div(count, each),
                bytes = length * element;
  return {static_cast<const char*>(p.b) + (line * p.b_stride + first) * element,
          stride,
          bytes,
          each,
          each * stride,
          places,
          ceil_div(places * each * ceil_div(bytes, kLine), turns),
          0,
          0};
}

}  // namespace
}  // namespace GPTCORE_ISA_NS
}  // namespace gptcore
