// Bytes of the host in the device's memory, by the parameters of launches: in the stream's order, and kept by a graph that
// captures them, where a copy would read host memory again each time the graph runs.
#pragma once

#include <cstdint>
#include <cstring>

#include "core/cuda/launch.cuh"

namespace gptcore::cuda {

constexpr int64_t kUploadWords = 7936;  // 31,744 bytes a launch
constexpr int kUploadThreads = 256;

struct UploadWords {
  uint32_t at[kUploadWords];
};

static __global__ void __launch_bounds__(kUploadThreads)
    store_words(const __grid_constant__ UploadWords words, uint32_t* to, int count) {
  for (int i = static_cast<int>(threadIdx.x); i < count; i += kUploadThreads) to[i] = words.at[i];
}

// `to` is device memory for items[0 .. count - 1], whose size is a multiple of 4 bytes.
template <class T>
void upload(const T* items, int64_t count, T* to) {
  static_assert(sizeof(T) % 4 == 0);
  const auto* from = reinterpret_cast<const unsigned char*>(items);
  const int64_t total = count * static_cast<int64_t>(sizeof(T) / 4);
  UploadWords words;
  for (int64_t begin = 0; begin < total; begin += kUploadWords) {
    const int64_t size = total - begin < kUploadWords ? total - begin : kUploadWords;
    std::memcpy(words.at, from + begin * 4, static_cast<size_t>(size) * 4);
    launch<&store_words>({dim3(1), dim3(kUploadThreads)}, words, reinterpret_cast<uint32_t*>(to) + begin,
                         static_cast<int>(size));
  }
}

}  // namespace gptcore::cuda
