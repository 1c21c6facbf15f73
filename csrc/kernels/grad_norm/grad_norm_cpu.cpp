#include "core/parallel.h"
#include "core/prefetch.h"
#include "core/simd.h"
#include "kernels/grad_norm/grad_norm_body.h"

namespace gptcore {
namespace GPTCORE_ISA_NS {
namespace {

constexpr int64_t kAhead = 4096;  // bytes; twice as far is the same

GPTCORE_INLINE double as_double(float x) { return x; }
GPTCORE_INLINE double as_double(bf16 x) { return widen(x); }

template <class T>
double slow_square_sum(const T* grad, int64_t size) {
  double sum = 0;
  for (int64_t i = 0; i < size; ++i) {
    const double g = as_double(grad[i]);
    sum += g * g;
  }
  return sum;
}

// Sums of squares in f32, four because two start per cycle and each takes four, and the largest magnitude as an
// integer, which tells infinities and NaN from finite numbers without a branch.
struct Squares {
  Vec sums[4];
  VecI largest[4];
};

GPTCORE_INLINE void take(Squares* squares, int place, Vec g) {
  const VecI magnitude = (VecI)abs(g);
  squares->sums[place] += g * g;
  squares->largest[place] = magnitude > squares->largest[place] ? magnitude : squares->largest[place];
}

// The first vectors, by fours; returns how many elements they had.
GPTCORE_INLINE int64_t take_fours(Squares* squares, const float* grad, int64_t size) {
  int64_t i = 0;
  for (; i + 4 * kLanes <= size; i += 4 * kLanes) {
    for (int place = 0; place < 4; ++place) {
      fetch_ahead<kAhead, 2>(grad + i + place * kLanes);
      take(squares, place, load(grad + i + place * kLanes));
    }
  }
  return i;
}

// Two numbers of 16 bits in each lane are widened by one instruction each, and compared in one.
GPTCORE_INLINE int64_t take_fours(Squares* squares, const bf16* grad, int64_t size) {
  typedef uint16_t Halves __attribute__((vector_size(kLanes * 4)));
  Halves largest[2] = {};
  int64_t i = 0;
  for (; i + 4 * kLanes <= size; i += 4 * kLanes) {
    for (int pair = 0; pair < 2; ++pair) {
      const bf16* at = grad + i + pair * 2 * kLanes;
      fetch_ahead<kAhead, 2>(at);
      VecU both;
      __builtin_memcpy(&both, at, sizeof(both));
      const Vec even = (Vec)(both << 16), odd = (Vec)(both & 0xffff0000u);
      squares->sums[2 * pair] += even * even;
      squares->sums[2 * pair + 1] += odd * odd;
      const Halves magnitude = (Halves)(both & 0x7fff7fffu);
      largest[pair] = magnitude > largest[pair] ? magnitude : largest[pair];
    }
  }
  for (int pair = 0; pair < 2; ++pair) {
    squares->largest[2 * pair] = (VecI)((VecU)largest[pair] << 16);
    squares->largest[2 * pair + 1] = (VecI)((VecU)largest[pair] & 0xffff0000u);
  }
  return i;
}

GPTCORE_INLINE VecI larger(VecI a, VecI b) { return a > b ? a : b; }

GPTCORE_INLINE int32_t largest_of(const VecI* magnitudes) {
  VecI x = larger(larger(magnitudes[0], magnitudes[1]), larger(magnitudes[2], magnitudes[3]));
  if constexpr (kLanes >= 16) x = larger(x, (VecI)upper<8>((Vec)x));
  if constexpr (kLanes >= 8) x = larger(x, (VecI)upper<4>((Vec)x));
  x = larger(x, (VecI)upper<2>((Vec)x));
  return larger(x, (VecI)upper<1>((Vec)x))[0];
}

template <class T>
double square_sum(const T* grad, int64_t size, bool* finite) {
  Squares squares = {};
  int64_t i = take_fours(&squares, grad, size);
  for (; i + kLanes <= size; i += kLanes) take(&squares, 0, load(grad + i));
  if (i < size) take(&squares, 1, load_n(grad + i, size - i));
  const int32_t top = largest_of(squares.largest);
  const Vec* sums = squares.sums;
  const float sum = reduce_add((sums[0] + sums[1]) + (sums[2] + sums[3]));
  *finite = top < 0x7f800000;
  // Below 1e-19 squares lose bits to the denormal range, above 1e19 they overflow. All-zero gradients are
  // common.
  const bool in_range = sum > 1e-30f && sum < 1e38f;
  return in_range || !*finite || top == 0 ? sum : slow_square_sum(grad, size);
}

// Returns whether all elements are finite.
template <class T>
bool task_sums(const T* grad, int64_t size, int64_t block, double* sums) {
  bool all = true;
  for (int64_t begin = 0; begin < size; begin += block, ++sums) {
    const int64_t end = size - begin < block ? size : begin + block;
    *sums = 0;
    for (int64_t at = begin; at < end; at += kSumElements) {
      bool finite;
      *sums += square_sum(grad + at, end - at < kSumElements ? end - at : kSumElements, &finite);
      all = all && finite;
    }
  }
  return all;
}

void square_sums(const GradNormTensor* tensors, const GradNormTask* tasks, int64_t count, int64_t block,
                 double* sums, bool* finite) {
  parallel_for(count, [&](int64_t i, int) {
    const GradNormTask& task = tasks[i];
    const auto [tensor, begin, size] = task.chunk;
    const void* data = tensors[tensor].data;
    double* const own = sums + task.first;
    finite[i] = tensors[tensor].bf16 ? task_sums(static_cast<const bf16*>(data) + begin, size, block, own)
                                     : task_sums(static_cast<const float*>(data) + begin, size, block, own);
  });
}

}  // namespace

extern const GradNormBodies grad_norm_bodies;
const GradNormBodies grad_norm_bodies = {square_sums, nullptr};

}  // namespace GPTCORE_ISA_NS
}  // namespace gptcore
