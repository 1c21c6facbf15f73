// Sums of gradients over the occurrences of each id, which lie together by now.
//
// An id of many occurrences, such as a comma's, would keep one block busy long after all others: chunks of kChunk
// occurrences are summed first, wherever they lie, then the chunks in order. Which occurrences make a chunk depends on
// the id's own alone.
#pragma once

#include "core/cuda/grid_of_rows.cuh"
#include "core/cuda/row_packs.cuh"
#include "kernels/embedding/embedding_plan.h"
#include "kernels/embedding/embedding_sort.cuh"

namespace gptcore::cuda {

// Occurrences of an id that are summed by one thread at a time; more are cut into chunks.
constexpr int64_t kChunk = 128;

// A chunk begins at a place of the sorted order; of each kChunk places at most two begin chunks: one of the id at the
// first place, and one of the last id where it begins behind that. So chunks' sums have a place of their own without
// being counted.
constexpr int64_t chunk_slots(int64_t tokens) { return 2 * ((tokens + kChunk - 1) / kChunk); }
__device__ __forceinline__ int64_t chunk_slot(int64_t id_begin, int64_t chunk_begin) {
  const int64_t window = chunk_begin / kChunk;
  return 2 * window + (id_begin > window * kChunk ? 1 : 0);
}

struct EmbeddingSums {
  SortedIds sorted;
  const void* grad_out;
  void* dweight;
  float* chunks;  // (chunk_slots, width)
  int64_t slots, vocabulary, tokens, width, grad_stride;
  bool accumulate, bf16_dweight, packed;
};

// The sum of rows row_of(begin) to row_of(end - 1), in order, from column c on; a few are asked for at a time.
template <class T, class RowOf>
__device__ __forceinline__ void sum_of_rows(int64_t begin, int64_t end, int left, bool packed,
                                            const RowOf& row_of, float (&sums)[kPackElements<T>]) {
  constexpr int kAhead = 4;
  for (float& sum : sums) sum = 0.0f;
  for (; begin < end; begin += kAhead) {
    uint4 raw[kAhead];
#pragma unroll
    for (int i = 0; i < kAhead; ++i) {
      raw[i] = make_uint4(0, 0, 0, 0);
      if (begin + i < end) raw[i] = load_raw(row_of(begin + i), left, packed);
    }
#pragma unroll
    for (int i = 0; i < kAhead; ++i) {
      if (begin + i >= end) break;
      float v[kPackElements<T>];
      unpack(raw[i], v);
#pragma unroll
      for (int k = 0; k < kPackElements<T>; ++k) sums[k] += v[k];
    }
  }
}

template <class T>
__device__ __forceinline__ void sum_of_occurrences(const EmbeddingSums& a, int64_t begin, int64_t end,
                                                   int64_t c, int left, float (&sums)[kPackElements<T>]) {
  const T* grad = static_cast<const T*>(a.grad_out) + c;
  sum_of_rows<T>(
      begin, end, left, a.packed, [&](int64_t i) { return grad + a.sorted.places[i] * a.grad_stride; }, sums);
}

// The chunk that has slot blockIdx.y * blockDim.y + threadIdx.y, if there is one.
template <class T>
__global__ void __launch_bounds__(kSortThreads) sum_chunks(const EmbeddingSums a) {
  constexpr int kCount = kPackElements<T>;
  const int64_t c = (int64_t{blockIdx.x} * blockDim.x + threadIdx.x) * kCount;
  if (c >= a.width) return;
  const int left = left_of<T>(a.width, c);
  for (int64_t slot = int64_t{blockIdx.y} * blockDim.y + threadIdx.y; slot < a.slots;
       slot += int64_t{gridDim.y} * blockDim.y) {
    const int64_t window = slot / 2 * kChunk;
    const int64_t last = window + kChunk - 1 < a.tokens ? window + kChunk - 1 : a.tokens - 1;
    const int64_t id = a.sorted.keys[slot % 2 ? last : window];
    if (id >= a.vocabulary) continue;
    const int64_t id_begin = a.sorted.begins[id], id_end = a.sorted.begins[id + 1];
    if (id_end - id_begin <= kChunk || (slot % 2 == 1) != (id_begin > window)) continue;
    const int64_t before = id_begin > window ? 0 : (window - id_begin + kChunk - 1) / kChunk;
    const int64_t begin = id_begin + before * kChunk, end = begin + kChunk < id_end ? begin + kChunk : id_end;
    if (begin >= id_end) continue;
    float sums[kCount];
    sum_of_occurrences<T>(a, begin, end, c, left, sums);
    float* out = a.chunks + slot * a.width + c;
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      if (i < left) out[i] = sums[i];
    }
  }
}

// kCount values of a row of dweight, or added to what is there.
template <int kCount>
__device__ __forceinline__ void store_gradient(const EmbeddingSums& a, int64_t at, int left,
                                               float (&v)[kCount]) {
  float* f32 = static_cast<float*>(a.dweight) + at;
  bf16* half = static_cast<bf16*>(a.dweight) + at;
  if (a.accumulate) {
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      if (i < left) v[i] = (a.bf16_dweight ? to_float(half[i]) : f32[i]) + v[i];
    }
  }
  if (!a.packed) {
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      if (i >= left) continue;
      if (a.bf16_dweight) {
        half[i] = from_float<bf16>(v[i]);
      } else {
        f32[i] = v[i];
      }
    }
    return;
  }
#pragma unroll
  for (int i = 0; i < kCount; i += 4) {
    if (a.bf16_dweight) {
      *reinterpret_cast<uint2*>(half + i) =
          make_uint2(pack_pair<bf16>(v[i], v[i + 1]), pack_pair<bf16>(v[i + 2], v[i + 3]));
    } else {
      *reinterpret_cast<float4*>(f32 + i) = make_float4(v[i], v[i + 1], v[i + 2], v[i + 3]);
    }
  }
}

// The sum of chunks' sums, in order.
template <int kCount>
__device__ __forceinline__ void sum_of_chunks(const EmbeddingSums& a, int64_t begin, int64_t end, int64_t c,
                                              int left, float (&sums)[kCount]) {
  for (float& sum : sums) sum = 0.0f;
#pragma unroll 4
  for (int64_t chunk = begin; chunk < end; chunk += kChunk) {
    const float* row = a.chunks + chunk_slot(begin, chunk) * a.width + c;
#pragma unroll
    for (int i = 0; i < kCount; ++i) sums[i] += i < left ? row[i] : 0.0f;
  }
}

// Rows of dweight, zeros for ids that do not occur.
template <class T>
__global__ void __launch_bounds__(kSortThreads) sum_ids(const EmbeddingSums a) {
  constexpr int kCount = kPackElements<T>;
  const int64_t c = (int64_t{blockIdx.x} * blockDim.x + threadIdx.x) * kCount;
  if (c >= a.width) return;
  const int left = left_of<T>(a.width, c);
  for (int64_t id = int64_t{blockIdx.y} * blockDim.y + threadIdx.y; id < a.vocabulary;
       id += int64_t{gridDim.y} * blockDim.y) {
    const int64_t begin = a.sorted.begins[id], end = a.sorted.begins[id + 1];
    if (begin == end && a.accumulate) continue;
    float sums[kCount];
    if (end - begin > kChunk) {
      sum_of_chunks(a, begin, end, c, left, sums);
    } else {
      sum_of_occurrences<T>(a, begin, end, c, left, sums);
    }
    store_gradient(a, id * a.width + c, left, sums);
  }
}

}  // namespace gptcore::cuda
