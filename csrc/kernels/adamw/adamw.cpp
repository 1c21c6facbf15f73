#include "kernels/adamw/adamw.h"

#include <cmath>
#include <limits>
#include <memory>

#include "core/check.h"
#include "core/isa.h"
#include "kernels/adamw/adamw_body.h"

namespace gptcore {

GPTCORE_BODIES(AdamwBodies, adamw_bodies)

namespace {

// 64 KiB of f32 per array: large beside the cost of a task, small enough that the last tasks end together.
constexpr int64_t kChunkElements = 16384;

using Views = std::vector<TensorView>;

std::string item(const char* name, size_t i) { return std::string(name) + "[" + std::to_string(i) + "]"; }

// The i-th of a list: on the CPU, of an allowed type, contiguous, shaped like the parameter. Names are built
// only for errors: thousands of tensors come by in a call.
void check_item(const Checker& check, const Views& list, const char* name, size_t i, const TensorView& like,
                std::initializer_list<DType> types, bool written) {
  const TensorView& tensor = list[i];
  bool type = false;
  for (DType allowed : types) type = type || tensor.dtype == allowed;
  bool same = tensor.ndim == like.ndim;
  for (int d = 0; same && d < like.ndim; ++d) same = tensor.sizes[d] == like.sizes[d];
  const bool fine = tensor.defined && tensor.device == Device::cpu && type && same &&
                    tensor.is_contiguous() && !(written && tensor.readonly);
  if (fine) return;
  const std::string full = item(name, i);
  check.input(tensor, full.c_str(), types);
  check.same_shape(tensor, full.c_str(), like, "params");
  check.contiguous(tensor, full.c_str());
  check.writable(tensor, full.c_str());
}

void check_length(const Checker& check, size_t length, const char* name, size_t expected) {
  if (length != expected) {
    check.fail(name, std::to_string(length) + " entries", std::to_string(expected) + ", one per parameter");
  }
}

void check_number(const Checker& check, bool condition, const char* name, double value,
                  const char* expected) {
  if (!condition) check.fail(name, std::to_string(value), expected);
}

void check_options(const Checker& check, const AdamwOptions& o) {
  if (o.step < 1) check.fail("step", std::to_string(o.step), "1 or more");
  check_number(check, o.lr >= 0 && std::isfinite(o.lr), "lr", o.lr, "a finite number, 0 or more");
  check_number(check, o.beta1 >= 0 && o.beta1 < 1, "beta1", o.beta1, "a number in [0, 1)");
  check_number(check, o.beta2 >= 0 && o.beta2 < 1, "beta2", o.beta2, "a number in [0, 1)");
  check_number(check, o.eps >= 0 && std::isfinite(o.eps), "eps", o.eps, "a finite number, 0 or more");
  check_number(check, o.grad_scale > 0 && std::isfinite(o.grad_scale), "grad_scale", o.grad_scale,
               "a finite number above 0");
  if (o.max_norm) check_number(check, *o.max_norm > 0, "max_norm", *o.max_norm, "a number above 0, or None");
}

std::vector<AdamwTensor> checked_tensors(const Checker& check, const Views& params, const Views& grads,
                                         const Views& exp_avgs, const Views& exp_avg_sqs, const Views& copies,
                                         const std::vector<double>& weight_decay, double lr) {
  const size_t count = params.size();
  check_length(check, grads.size(), "grads", count);
  check_length(check, exp_avgs.size(), "exp_avgs", count);
  check_length(check, exp_avg_sqs.size(), "exp_avg_sqs", count);
  check_length(check, weight_decay.size(), "weight_decay", count);
  if (!copies.empty()) check_length(check, copies.size(), "copies", count);
  std::vector<AdamwTensor> tensors(count);
  for (size_t i = 0; i < count; ++i) {
    const TensorView& p = params[i];
    check_item(check, params, "params", i, p, {DType::f32}, true);
    check_item(check, grads, "grads", i, p, {DType::f32, DType::bf16}, false);
    check_item(check, exp_avgs, "exp_avgs", i, p, {DType::f32}, true);
    check_item(check, exp_avg_sqs, "exp_avg_sqs", i, p, {DType::f32}, true);
    if (!copies.empty()) check_item(check, copies, "copies", i, p, {DType::bf16}, true);
    if (!(weight_decay[i] >= 0)) {
      check.fail(item("weight_decay", i).c_str(), std::to_string(weight_decay[i]), "a number, 0 or more");
    }
    tensors[i] = {p.as<float>(),
                  exp_avgs[i].as<float>(),
                  exp_avg_sqs[i].as<float>(),
                  grads[i].data,
                  copies.empty() ? nullptr : copies[i].as<bf16>(),
                  grads[i].dtype == DType::bf16,
                  static_cast<float>(1.0 - lr * weight_decay[i])};
  }
  return tensors;
}

std::vector<AdamwChunk> chunks_of(const Views& params) {
  std::vector<AdamwChunk> chunks;
  for (size_t i = 0; i < params.size(); ++i) {
    const int64_t size = params[i].numel();
    for (int64_t begin = 0; begin < size; begin += kChunkElements) {
      const int64_t rest = size - begin;
      chunks.push_back({static_cast<int64_t>(i), begin, rest < kChunkElements ? rest : kChunkElements});
    }
  }
  return chunks;
}

}  // namespace

std::pair<double, bool> adamw(const Views& params, const Views& grads, const Views& exp_avgs,
                              const Views& exp_avg_sqs, const Views& copies,
                              const std::vector<double>& weight_decay, const AdamwOptions& o) {
  const Checker check("adamw_");
  check_options(check, o);
  const std::vector<AdamwTensor> tensors =
      checked_tensors(check, params, grads, exp_avgs, exp_avg_sqs, copies, weight_decay, o.lr);
  const std::vector<AdamwChunk> chunks = chunks_of(params);
  const int64_t count = static_cast<int64_t>(chunks.size());
  const AdamwBodies& bodies = adamw_bodies_table.pick();

  std::vector<double> sums(chunks.size());
  const std::unique_ptr<bool[]> finite(new bool[chunks.size()]);
  bodies.square_sums(tensors.data(), chunks.data(), count, sums.data(), finite.get());
  double total = 0;
  bool found_inf = false;
  for (int64_t i = 0; i < count; ++i) {
    total += sums[i];
    found_inf = found_inf || !finite[i];
  }
  const double norm = std::sqrt(total) / o.grad_scale;
  if (found_inf) return {norm, true};

  const double clip = o.max_norm && *o.max_norm < norm + 1e-6 ? *o.max_norm / (norm + 1e-6) : 1.0;
  AdamwNumbers numbers;
  numbers.grad_factor = static_cast<float>(clip / o.grad_scale);
  numbers.beta2 = static_cast<float>(o.beta2);
  numbers.rest1 = static_cast<float>(1.0 - o.beta1);
  numbers.rest2 = static_cast<float>(1.0 - o.beta2);
  const double step = static_cast<double>(o.step);
  numbers.step_size = static_cast<float>(o.lr / (1.0 - std::pow(o.beta1, step)));
  numbers.root_factor = static_cast<float>(1.0 / std::sqrt(1.0 - std::pow(o.beta2, step)));
  numbers.eps = static_cast<float>(o.eps);
  bodies.update(tensors.data(), chunks.data(), count, numbers);
  return {norm, false};
}

}  // namespace gptcore
