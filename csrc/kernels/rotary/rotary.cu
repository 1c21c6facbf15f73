// Rotary position embedding on CUDA: a thread has one place of a token's heads and turns it in several heads, so that
// their angles are read once.
#include "core/cuda/launch.cuh"
#include "core/cuda/row_packs.cuh"
#include "kernels/rotary/rotary_body.h"

namespace gptcore::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kHeads = 4;  // that a thread turns

// Of a head: packs that turn (pairs of packs where the pairs are halves), then packs that are copied.
struct Places {
  int turning, copied;
  bool packed;  // whether packs may be moved whole
  int64_t all;  // of one token: packs times groups of heads
};

__host__ __device__ inline int64_t quotient(int64_t n, int64_t d) {  // 32 bits are divided many times as fast
  return (n | d) >> 32 ? n / d : static_cast<uint32_t>(n) / static_cast<uint32_t>(d);
}

// kCount angles of a row of the table; NaN where there is no such row.
template <int kCount>
__device__ __forceinline__ void load_angles(const Rotary& a, const float* table, int64_t position, int i,
                                            bool packed, float (&v)[kCount]) {
  if (position < 0 || position >= a.length) {
#pragma unroll
    for (int k = 0; k < kCount; ++k) v[k] = __uint_as_float(0x7fffffffu);
    return;
  }
  const float* row = table + position * a.half + i;
  if (packed) {
#pragma unroll
    for (int k = 0; k < kCount; k += 2) {
      const float2 pair = __ldg(reinterpret_cast<const float2*>(row + k));
      v[k] = pair.x, v[k + 1] = pair.y;
    }
  } else {
#pragma unroll
    for (int k = 0; k < kCount; ++k) v[k] = i + k < a.half ? row[k] : 0.0f;
  }
}

// Pairs that lie `half` apart.
template <class T>
__device__ __forceinline__ void turn_halves(const Rotary& a, const T* x, T* out, int pack, int heads,
                                            int64_t position, bool packed) {
  constexpr int kCount = kPackElements<T>;
  const int i = pack * kCount, left = static_cast<int>(a.half) - i;
  float c[kCount], s[kCount];
  load_angles(a, a.cos, position, i, packed, c);
  load_angles(a, a.sin, position, i, packed, s);
  x += i, out += i;
  for (int head = 0; head < heads; ++head, x += a.x_strides.head, out += a.out_strides.head) {
    float u[kCount], v[kCount];
    unpack(load_raw(x, left, packed), u), unpack(load_raw(x + a.half, left, packed), v);
#pragma unroll
    for (int k = 0; k < kCount; ++k) {
      const float sine = a.inverse ? -s[k] : s[k], first = u[k];
      u[k] = first * c[k] - v[k] * sine;
      v[k] = v[k] * c[k] + first * sine;
    }
    store_some(out, u, left, packed), store_some(out + a.half, v, left, packed);
  }
}

// Pairs of neighbours.
template <class T>
__device__ __forceinline__ void turn_neighbours(const Rotary& a, const T* x, T* out, int pack, int heads,
                                                int64_t position, bool packed) {
  constexpr int kCount = kPackElements<T>;
  const int i = pack * kCount, left = 2 * static_cast<int>(a.half) - i;
  float c[kCount / 2], s[kCount / 2];
  load_angles(a, a.cos, position, i / 2, packed, c);
  load_angles(a, a.sin, position, i / 2, packed, s);
  x += i, out += i;
  for (int head = 0; head < heads; ++head, x += a.x_strides.head, out += a.out_strides.head) {
    float v[kCount];
    unpack(load_raw(x, left, packed), v);
#pragma unroll
    for (int k = 0; k < kCount; k += 2) {
      const float sine = a.inverse ? -s[k / 2] : s[k / 2], first = v[k];
      v[k] = first * c[k / 2] - v[k + 1] * sine;
      v[k + 1] = v[k + 1] * c[k / 2] + first * sine;
    }
    store_some(out, v, left, packed);
  }
}

template <class T>
__device__ __forceinline__ void copy_rest(const Rotary& a, const T* x, T* out, int pack, int heads,
                                          bool packed) {
  const int i = 2 * static_cast<int>(a.half) + pack * kPackElements<T>;
  const int left = static_cast<int>(a.head_size) - i;
  x += i, out += i;
  for (int head = 0; head < heads; ++head, x += a.x_strides.head, out += a.out_strides.head) {
    float v[kPackElements<T>];
    unpack(load_raw(x, left, packed), v);
    store_some(out, v, left, packed);
  }
}

template <class T>
__global__ void __launch_bounds__(kThreads) rotate(const Rotary a, const Places p) {
  const int64_t n = int64_t{blockIdx.x} * blockDim.y + threadIdx.y;  // of all sequences' tokens
  if (n >= a.batch * a.tokens) return;
  const int64_t sequence = quotient(n, a.tokens), token = n - sequence * a.tokens;
  const int64_t position =
      a.positions ? a.positions[sequence * a.position_batch_stride + token] : a.offset + token;
  const T* x = static_cast<const T*>(a.x) + sequence * a.x_strides.batch + token * a.x_strides.token;
  T* out = static_cast<T*>(a.out) + sequence * a.out_strides.batch + token * a.out_strides.token;
  const int packs = p.turning + p.copied;
  for (int64_t place = int64_t{blockIdx.y} * blockDim.x + threadIdx.x; place < p.all;
       place += int64_t{gridDim.y} * blockDim.x) {
    const int64_t group = quotient(place, packs), head = group * kHeads;
    const int pack = static_cast<int>(place - group * packs);
    const int heads = a.heads - head < kHeads ? static_cast<int>(a.heads - head) : kHeads;
    const T* from = x + head * a.x_strides.head;
    T* to = out + head * a.out_strides.head;
    if (pack >= p.turning) {
      copy_rest(a, from, to, pack - p.turning, heads, p.packed);
    } else if (a.interleaved) {
      turn_neighbours(a, from, to, pack, heads, position, p.packed);
    } else {
      turn_halves(a, from, to, pack, heads, position, p.packed);
    }
  }
}

template <class T>
bool strides_are_packed(const void* p, const RotaryStrides& strides) {
  return can_pack<T>(p, strides.batch) && can_pack<T>(p, strides.token) && can_pack<T>(p, strides.head);
}

template <class T>
void run(const Rotary& a) {
  constexpr int kCount = kPackElements<T>;
  const auto packs_of = [](int64_t elements) { return static_cast<int>((elements + kCount - 1) / kCount); };
  Places p{};
  p.turning = packs_of(a.interleaved ? 2 * a.half : a.half);
  p.copied = a.x == a.out ? 0 : packs_of(a.head_size - 2 * a.half);
  p.packed = strides_are_packed<T>(a.x, a.x_strides) && strides_are_packed<T>(a.out, a.out_strides) &&
             a.half % (a.interleaved ? kCount / 2 : kCount) == 0 && a.half % 2 == 0 &&
             (a.head_size - 2 * a.half) % kCount == 0 && can_pack<float>(a.cos, 0) &&
             can_pack<float>(a.sin, 0);
  p.all = (a.heads + kHeads - 1) / kHeads * (p.turning + p.copied);
  const int lanes = p.all < kThreads ? static_cast<int>(p.all) : kThreads, tokens = kThreads / lanes;
  const int64_t across = (p.all + lanes - 1) / lanes;
  launch<&rotate<T>>({dim3(static_cast<unsigned>((a.batch * a.tokens + tokens - 1) / tokens),
                           static_cast<unsigned>(across < 65535 ? across : 65535)),
                      dim3(static_cast<unsigned>(lanes), static_cast<unsigned>(tokens))},
                     a, p);
}

}  // namespace

GPTCORE_CUDA_BODIES(RotaryBodies, rotary_bodies) = {{run<float>, run<bf16>}};

}  // namespace gptcore::cuda
