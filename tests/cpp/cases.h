// Kernel calls for the driver in main.cpp: each makes its inputs from fixed seeds, calls contracts (<op>.h) with
// sizes that make several tasks, and gives back everything that was written.
#pragma once

#include <cstdint>
#include <cstring>
#include <functional>
#include <initializer_list>
#include <string>
#include <utility>
#include <vector>

#include "core/tensor_view.h"

namespace gptcore::cases {

// A contiguous tensor that owns its memory.
class Tensor {
 public:
  Tensor(DType dtype, std::vector<int64_t> sizes) : dtype_(dtype), sizes_(std::move(sizes)) {
    bytes_.resize(static_cast<size_t>(view().numel() * size_of(dtype)));
  }

  TensorView view() const {
    TensorView view;
    view.data = const_cast<char*>(bytes_.data());
    view.dtype = dtype_, view.defined = true;
    view.ndim = static_cast<int32_t>(sizes_.size()), view.sizes = sizes_.data();
    return view;
  }
  operator TensorView() const { return view(); }
  const std::vector<char>& bytes() const { return bytes_; }

 private:
  DType dtype_;
  std::vector<int64_t> sizes_;
  std::vector<char> bytes_;
};

// The same numbers for a seed on every machine: a linear congruential generator's upper bits.
class Random {
 public:
  explicit Random(uint64_t seed) : state_(seed * 0x9e3779b97f4a7c15u + 1) {}
  uint32_t next() {
    state_ = state_ * 6364136223846793005u + 1442695040888963407u;
    return static_cast<uint32_t>(state_ >> 32);
  }
  float uniform() { return static_cast<float>(next() >> 8) * 0x1p-23f - 1.0f; }  // [-1, 1)

 private:
  uint64_t state_;
};

inline Tensor uniform(DType dtype, std::vector<int64_t> sizes, uint64_t seed) {
  Tensor tensor(dtype, std::move(sizes));
  Random random(seed);
  const TensorView view = tensor;
  for (int64_t i = 0; i < view.numel(); ++i) {
    const float value = random.uniform();
    if (dtype == DType::f32) {
      view.as<float>()[i] = value;
    } else {
      uint32_t bits;
      std::memcpy(&bits, &value, sizeof(bits));
      view.as<bf16>()[i].bits = static_cast<uint16_t>(bits >> 16);
    }
  }
  return tensor;
}

// int32 or int64 in [0, below).
inline Tensor indices(DType dtype, std::vector<int64_t> sizes, uint32_t below, uint64_t seed) {
  Tensor tensor(dtype, std::move(sizes));
  Random random(seed);
  const TensorView view = tensor;
  for (int64_t i = 0; i < view.numel(); ++i) {
    const uint32_t value = random.next() % below;
    if (dtype == DType::i64) {
      view.as<int64_t>()[i] = value;
    } else {
      view.as<int32_t>()[i] = static_cast<int32_t>(value);
    }
  }
  return tensor;
}

using Outputs = std::vector<Tensor>;

inline std::vector<TensorView> views(const std::vector<Tensor>& tensors) {
  return std::vector<TensorView>(tensors.begin(), tensors.end());
}

// Random tensors of these many elements, as optimizers take them: several chunks, and some smaller than one.
inline std::vector<Tensor> uniform_list(DType dtype, uint64_t seed) {
  std::vector<Tensor> tensors;
  for (const int64_t size : {40000, 7, 30001}) tensors.push_back(uniform(dtype, {size}, seed++));
  return tensors;
}

struct Case {
  std::string name;
  std::function<Outputs()> run;
};

inline std::vector<Case>& all() {
  static std::vector<Case> cases;
  return cases;
}

// At namespace scope: one case.
struct Once {
  Once(const std::string& name, const std::function<Outputs()>& run) { all().push_back({name, run}); }
};

// At namespace scope: one case for each of f32 and bf16, with the type in its name.
struct ForBothTypes {
  ForBothTypes(const std::string& name, const std::function<Outputs(DType)>& run) {
    for (DType dtype : {DType::f32, DType::bf16}) {
      all().push_back({name + " " + name_of(dtype), [run, dtype] { return run(dtype); }});
    }
  }
};

}  // namespace gptcore::cases
