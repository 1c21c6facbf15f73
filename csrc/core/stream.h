// Stores past the caches, for results larger than these: an ordinary store first reads the line it writes
// ("read for ownership") and throws out what others may still want. A thread that streamed calls
// stream_fence() before it reports its task done, since such stores are not ordered with others.
#pragma once

#include "core/simd.h"

namespace gptcore {

// Whether memory stands behind all of an array, by a sample of its pages; a few system calls of half a microsecond.
// Where it does not, the kernel zeroes each page when it is first written, in the cache: the ordinary store that
// follows finds it there, one past the caches first throws it out (a quarter slower than ordinary ones).
bool lies_in_memory(const void* start, int64_t bytes);

namespace GPTCORE_ISA_NS {

#if defined(__SSE2__)
constexpr bool kCanStream = true;
constexpr int64_t kStreamLine = sizeof(Vec);  // alignment of a streamed vector
#else
constexpr bool kCanStream = false;
constexpr int64_t kStreamLine = 64;
#endif

// Results of fewer bytes are left to the caches, where the next operation may find them. Measured with 2
// MB of L2 a core: from 16 MiB on both the operation (1.15 to 1.5 times) and it with a product or a
// maximum behind it (0.96 to 1.15) are faster past the caches; at 12 MiB that turns with what ran before
// (0.86 to 1.5), at 3 MiB a maximum behind it loses (0.76). What zeroes a table, and reads nothing, gains
// from larger sizes only: 77 MB cost the same either way, 154 MB half.
constexpr int64_t kStreamBytes = 16 << 20, kStreamZeroBytes = 64 << 20;

// Whether rows from `p` on, `stride_bytes` apart, are worth streaming and lie where stream() may store.
GPTCORE_INLINE bool can_stream(const void* p, int64_t stride_bytes, int64_t bytes) {
  return kCanStream && bytes >= kStreamBytes &&
         ((reinterpret_cast<uintptr_t>(p) | static_cast<uintptr_t>(stride_bytes)) & 63) == 0 &&
         lies_in_memory(p, bytes);
}

GPTCORE_INLINE void stream(float* p, Vec x) {
#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
  *reinterpret_cast<Vec*>(p) = x;  // a plain store, checked for its alignment too
#elif defined(__AVX512F__)
  _mm512_stream_ps(p, (__m512)x);
#elif defined(__AVX2__)
  _mm256_stream_ps(p, (__m256)x);
#elif defined(__SSE2__)
  _mm_stream_ps(p, (__m128)x);
#else
  store(p, x);
#endif
}

// Two vectors side by side, which make a whole line of bf16 on AVX-512.
GPTCORE_INLINE void stream(float* p, Vec low, Vec high) { stream(p, low), stream(p + kLanes, high); }
GPTCORE_INLINE void stream(bf16* p, Vec low, Vec high) {
#if defined(__AVX512BF16__)
  stream(reinterpret_cast<float*>(p), (Vec)_mm512_cvtne2ps_pbh((__m512)high, (__m512)low));
#elif defined(__SSE2__)
  union {
    VecH halves[2];
    Vec words;
  } both = {{narrow(low), narrow(high)}};
  stream(reinterpret_cast<float*>(p), both.words);
#else
  store(p, low), store(p + kLanes, high);
#endif
}

GPTCORE_INLINE void stream_zeros(void* start, int64_t bytes) {
  char* p = static_cast<char*>(start);
  if (!kCanStream || bytes < 4 * kStreamLine) {
    __builtin_memset(p, 0, static_cast<size_t>(bytes));
    return;
  }
  const int64_t head = -reinterpret_cast<intptr_t>(p) & (kStreamLine - 1);
  __builtin_memset(p, 0, static_cast<size_t>(head));
  int64_t at = head;
  for (; at + kStreamLine <= bytes; at += kStreamLine) stream(reinterpret_cast<float*>(p + at), Vec{});
  __builtin_memset(p + at, 0, static_cast<size_t>(bytes - at));
}

GPTCORE_INLINE void stream_fence() {
#if defined(__SSE2__)
  _mm_sfence();
#endif
}

}  // namespace GPTCORE_ISA_NS
}  // namespace gptcore
