// Scratch memory for kernels, which never allocate themselves: a stack of bytes per thread that grows to the
// largest need and is kept over calls, so that steady work touches no fresh pages.
#pragma once

#include <cstddef>
#include <cstdint>

namespace gptcore {

// A frame on the calling thread's scratch stack: 64-byte aligned, contents undefined, released in reverse
// order.
class Scratch {
 public:
  explicit Scratch(size_t bytes);
  ~Scratch();
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;

  template <class T>
  T* as() const {
    return static_cast<T*>(data_);
  }

 private:
  void* data_;
  size_t mark_;
  int block_;
};

// Bytes that scratch stacks of all threads hold at present.
int64_t scratch_bytes();

}  // namespace gptcore
