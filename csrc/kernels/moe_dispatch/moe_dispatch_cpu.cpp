#include "core/parallel.h"
#include "core/simd.h"
#include "kernels/moe_dispatch/moe_dispatch_body.h"

namespace gptcore {
namespace GPTCORE_ISA_NS {
namespace {

// Elements moved by one thread before a second one pays.
constexpr int64_t kGrainElements = 16384;

int64_t grain(int64_t row_elements) { return kGrainElements / (row_elements + 1) + 1; }

template <class T>
void clear_rows(T* sorted, int64_t stride, int64_t first, int64_t end, int64_t width) {
  parallel_ranges(end - first, grain(width), [&](int64_t begin, int64_t stop) {
    for (int64_t r = first + begin; r < first + stop; ++r) {
      __builtin_memset(sorted + r * stride, 0, static_cast<size_t>(width) * sizeof(T));
    }
  });
}

template <class T>
void dispatch(const MoeDispatch& a) {
  T* sorted = static_cast<T*>(a.sorted);
  parallel_ranges(a.count, grain(a.width * (a.choices + 1)), [&](int64_t begin, int64_t end) {
    for (int64_t n = begin; n < end; ++n) {
      const T* from = static_cast<const T*>(a.tokens) + n * a.token_stride;
      for (int64_t k = 0; k < a.choices; ++k) {
        const int64_t row = a.rows[n * a.choices + k];
        if (row < 0) continue;
        __builtin_memcpy(sorted + row * a.sorted_stride, from, static_cast<size_t>(a.width) * sizeof(T));
      }
    }
  });
  clear_rows(sorted, a.sorted_stride, a.used, a.all, a.width);
}

// The rows of a token that are there, in the order of its choices.
template <class T>
struct Chosen {
  const T* row[kMostDispatchChoices];
  float gate[kMostDispatchChoices];
  int64_t count = 0;
};

template <class T>
GPTCORE_INLINE void find_chosen(const MoeCombine& a, int64_t n, Chosen<T>* chosen) {
  chosen->count = 0;
  for (int64_t k = 0; k < a.choices; ++k) {
    const int64_t at = n * a.choices + k, row = a.rows[at];
    if (row < 0) continue;
    chosen->row[chosen->count] = static_cast<const T*>(a.sorted) + row * a.sorted_stride;
    chosen->gate[chosen->count++] = a.gates ? a.gates[at] : 1.0f;
  }
}

template <class T>
void combine(const MoeCombine& a) {
  parallel_ranges(a.count, grain(a.width * (a.choices + 1)), [&](int64_t begin, int64_t end) {
    Chosen<T> chosen;
    for (int64_t n = begin; n < end; ++n) {
      find_chosen(a, n, &chosen);
      T* out = static_cast<T*>(a.tokens) + n * a.token_stride;
      for_lanes(a.width, [&](int64_t c, int64_t lanes) {
        Vec sum = {};
        for (int64_t k = 0; k < chosen.count; ++k) {
          sum += load_some(chosen.row[k] + c, lanes) * chosen.gate[k];
        }
        store_some(out + c, sum, lanes);
      });
    }
  });
}

// Four running sums hide the latency of an addition.
template <class T>
GPTCORE_INLINE float dot(const T* x, const T* y, int64_t width) {
  Vec sums[4] = {};
  int64_t c = 0;
  for (; c + 4 * kLanes <= width; c += 4 * kLanes) {
    for (int s = 0; s < 4; ++s) sums[s] += load(x + c + s * kLanes) * load(y + c + s * kLanes);
  }
  for (; c + kLanes <= width; c += kLanes) sums[0] += load(x + c) * load(y + c);
  if (c < width) sums[1] += load_n(x + c, width - c) * load_n(y + c, width - c);
  return reduce_add((sums[0] + sums[1]) + (sums[2] + sums[3]));
}

template <class T>
void combine_backward(const MoeCombineBackward& a) {
  T* dsorted = static_cast<T*>(a.dsorted);
  parallel_ranges(a.count, grain(2 * a.width * (a.choices + 1)), [&](int64_t begin, int64_t end) {
    for (int64_t at = begin * a.choices; at < end * a.choices; ++at) {
      const int64_t row = a.rows[at];
      if (row < 0) {
        a.dgates[at] = 0.0f;
        continue;
      }
      const T* dtoken = static_cast<const T*>(a.dtokens) + at / a.choices * a.token_stride;
      a.dgates[at] = dot(dtoken, static_cast<const T*>(a.sorted) + row * a.sorted_stride, a.width);
      const float gate = a.gates[at];
      T* out = dsorted + row * a.dsorted_stride;
      for_lanes(a.width, [&](int64_t c, int64_t lanes) {
        store_some(out + c, load_some(dtoken + c, lanes) * gate, lanes);
      });
    }
  });
  clear_rows(dsorted, a.dsorted_stride, a.used, a.all, a.width);
}

}  // namespace

extern const MoeDispatchBodies moe_dispatch_bodies;
const MoeDispatchBodies moe_dispatch_bodies = {{dispatch<float>, dispatch<bf16>},
                                               {combine<float>, combine<bf16>},
                                               {combine_backward<float>, combine_backward<bf16>}};

}  // namespace GPTCORE_ISA_NS
}  // namespace gptcore
