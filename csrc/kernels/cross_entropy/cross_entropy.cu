// Cross-entropy on CUDA: see core/cuda/loss_rows.cuh.
#include "core/cuda/loss_rows.cuh"
#include "core/cuda/loss_totals.cuh"
#include "core/cuda/scratch.h"
#include "kernels/cross_entropy/cross_entropy_body.h"

namespace gptcore::cuda {
namespace {

constexpr int64_t kDivisors = 3;

LossDivisors divisors_of(const CrossEntropyDevice& a, double* divisors) {
  const LossRows& r = a.rows;
  return {r.targets, r.ignore_index, r.rows, r.classes, r.class_weight, nullptr, a.mean, divisors};
}

template <class T>
void forward(const CrossEntropyDevice& a) {
  const DeviceScratch room((kDivisors + a.rows.rows) * static_cast<int64_t>(sizeof(double)));
  LossRows rows = a.rows;
  rows.divisors = room.as<double>(), rows.row_loss = room.as<double>() + kDivisors;
  run_loss_divisors(divisors_of(a, room.as<double>()));
  run_loss_rows<T, T>(rows);
  run_loss_totals({rows.row_loss, nullptr, rows.divisors, rows.rows, a.per_row, a.loss, nullptr,
                   a.loss_stride, 0, a.bf16_loss});
}

template <class T>
void backward(const CrossEntropyDevice& a) {
  const DeviceScratch room(kDivisors * static_cast<int64_t>(sizeof(double)));
  LossRows rows = a.rows;
  rows.divisors = room.as<double>();
  run_loss_divisors(divisors_of(a, room.as<double>()));
  run_loss_rows<T, T>(rows);
}

}  // namespace

GPTCORE_CUDA_BODIES(CrossEntropyDeviceBodies, cross_entropy_device_bodies) = {
    {forward<float>, forward<bf16>}, {backward<float>, backward<bf16>}};

}  // namespace gptcore::cuda
