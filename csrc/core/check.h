// Argument checks. Each failing check throws an error whose sentence names the op, the argument, what came
// and what was expected; the bindings turn Error into ValueError and TypeError_ into TypeError.
// Checks run once, in <op>.cpp, before a byte is written.
#pragma once

#include <cstdint>
#include <initializer_list>
#include <stdexcept>
#include <string>
#include <vector>

#include "core/device_link.h"
#include "core/tensor_view.h"

namespace gptcore {

struct ValueError : std::invalid_argument {
  using std::invalid_argument::invalid_argument;
};
struct TypeError : std::invalid_argument {
  using std::invalid_argument::invalid_argument;
};

// "f32 (2, 3)" for messages.
std::string describe(const TensorView& tensor);

// Collects the op's name so that each check is one short line:
//   Checker check("layer_norm");
//   check.dtype(x, "x", {DType::f32, DType::bf16});
class Checker {
 public:
  explicit Checker(const char* op) : op_(op) {}
  // For an op whose kernels may come from another module: tensors there are fine once its bodies are.
  Checker(const char* op, const DeviceSlot& slot) : op_(op), slot_(&slot) {}

  void defined(const TensorView& tensor, const char* argument) const;
  // On the CPU or, where the op has bodies for it, another device: the one of the call's other tensors.
  void on_device(const TensorView& tensor, const char* argument) const;
  void dtype(const TensorView& tensor, const char* argument, std::initializer_list<DType> allowed) const;
  void ndim(const TensorView& tensor, const char* argument, int expected) const;
  // Sizes must match; -1 accepts any.
  void shape(const TensorView& tensor, const char* argument, std::initializer_list<int64_t> expected) const;
  void same_shape(const TensorView& tensor, const char* argument, const TensorView& like,
                  const char* like_name) const;
  void contiguous(const TensorView& tensor, const char* argument) const;
  // The last dimension has stride 1 (or at most one element).
  void last_contiguous(const TensorView& tensor, const char* argument) const;
  void writable(const TensorView& tensor, const char* argument) const;

  // Where the tensors lie that were checked so far.
  Device device() const { return device_; }

  // The usual bundle for an input: defined, on the call's device, of one of these types.
  void input(const TensorView& tensor, const char* argument, std::initializer_list<DType> allowed) const {
    defined(tensor, argument);
    on_device(tensor, argument);
    dtype(tensor, argument, allowed);
  }
  // The same for an output, which must also be writable.
  void output(const TensorView& tensor, const char* argument, std::initializer_list<DType> allowed) const {
    input(tensor, argument, allowed);
    writable(tensor, argument);
  }

  // For ops over lists of tensors. list[i]: on the call's device, of an allowed type, contiguous, shaped like its
  // parameter. Thousands of tensors come by in a call, so names are built only for errors.
  void item(const std::vector<TensorView>& list, const char* name, size_t i, const TensorView& like,
            std::initializer_list<DType> allowed, bool written) const;
  // A list's length: one entry for each parameter.
  void length(size_t length, const char* name, size_t expected) const;
  void number(bool condition, const char* name, double value, const char* expected) const;

  // ValueError, TypeError: "op: argument 'name': got <got>, expected <expected>". Called where a check has failed, so
  // that no sentence is made before: a handful of strings takes as long as a small kernel.
  [[noreturn]] void fail(const char* argument, const std::string& got, const std::string& expected) const;
  [[noreturn]] void fail_type(const char* argument, const std::string& got,
                              const std::string& expected) const;

 private:
  const char* op_;
  const DeviceSlot* slot_ = nullptr;
  // Of the first tensor checked: what the others must share.
  mutable bool seen_ = false;
  mutable Device device_ = Device::cpu;
  mutable int32_t device_index_ = 0;
};

}  // namespace gptcore
