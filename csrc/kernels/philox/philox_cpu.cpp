#include "core/parallel.h"
#include "core/philox.h"
#include "kernels/philox/philox_body.h"

namespace gptcore {
namespace GPTCORE_ISA_NS {
namespace {

// Counters below which a second thread does not pay: some 30 microseconds of work.
constexpr int64_t kGrain = 32768;

void range(const PhiloxKey& key, const uint32_t* counters, int64_t begin, int64_t end, uint32_t* out) {
  int64_t n = begin;
  for (; n + kLanes <= end; n += kLanes) {
    VecU words[4];
    __builtin_memcpy(words, counters + 4 * n, sizeof words);
    transpose_words(words);
    philox(key, words);
    transpose_words(words);
    __builtin_memcpy(out + 4 * n, words, sizeof words);
  }
  for (; n < end; ++n) {
    uint32_t words[4];
    __builtin_memcpy(words, counters + 4 * n, sizeof words);
    philox(key, words);
    __builtin_memcpy(out + 4 * n, words, sizeof words);
  }
}

void run(uint64_t seed, const uint32_t* counters, int64_t count, uint32_t* out) {
  const PhiloxKey key = philox_key(seed);
  parallel_ranges(count, kGrain, [&](int64_t begin, int64_t end) { range(key, counters, begin, end, out); });
}

}  // namespace

extern const PhiloxBodies philox_bodies;
const PhiloxBodies philox_bodies = {run};

}  // namespace GPTCORE_ISA_NS
}  // namespace gptcore
