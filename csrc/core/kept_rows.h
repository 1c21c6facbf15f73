// What losses over class targets share: the check of targets, the rows that are not ignored, the shapes of
// results.
#pragma once

#include <cstdint>
#include <string>

#include "core/arena.h"
#include "core/check.h"
#include "core/tensor_view.h"

namespace gptcore {

// (rows) contiguous int64, each a class below `classes` or ignore_index.
void check_targets(const Checker& check, const TensorView& targets, int64_t rows, int64_t classes,
                   int64_t ignore_index);

// "mean", "sum" or "none", and a smoothing share of 0 to 1.
void check_loss_options(const Checker& check, const std::string& reduction, double label_smoothing);

// One element, or one per row where nothing is reduced.
void check_loss(const Checker& check, const TensorView& tensor, const char* name, int64_t rows,
                const std::string& reduction, std::initializer_list<DType> types);

// (rows) contiguous f32.
void check_row_values(const Checker& check, const TensorView& tensor, const char* name, int64_t rows);

// (classes) contiguous, of one of these types.
void check_class_values(const Checker& check, const TensorView& tensor, const char* name, int64_t classes,
                        std::initializer_list<DType> types);

// The gradient of a row's loss; 0 where `grad` is None.
float loss_gradient(const TensorView& grad, bool per_row, int64_t row);

// Rounds once to the type of `out`, f32 or bf16.
void store_rounded(const TensorView& out, int64_t at, double value);

// Writes zeros to all of a matrix.
void zero_matrix(const TensorView& tensor);

// The rows whose target counts, in order, with room for f32 values of each, on the scratch stack. Arrays are
// padded to a multiple of `padding` rows, so that kernels may read whole vectors.
class KeptRows {
 public:
  // Where `slice` is above 0 only that many classes from `first` on are here: classes() counts from `first`, and is
  // -1 where a target is none of them.
  KeptRows(const TensorView& targets, int64_t ignore_index, int value_arrays, int64_t padding,
           int64_t first = 0, int64_t slice = 0);

  int64_t count() const { return count_; }
  int64_t padded() const { return padded_; }
  int32_t row(int64_t i) const { return rows_[i]; }
  const int32_t* rows() const { return rows_; }        // padded with 0
  const int32_t* classes() const { return classes_; }  // padded with -1
  float* values(int array) const;                      // zeroed

 private:
  int64_t padded_, count_ = 0;
  Scratch room_;
  int32_t *rows_, *classes_;
};

// A tensor of one number per class as f32, each times `factor`; ones where it is None. The tensor itself
// where it is f32 and the factor 1.
class ClassValues {
 public:
  ClassValues(const TensorView& tensor, int64_t classes, double factor);
  const float* values() const { return values_; }  // null where the tensor is None
  double at(int32_t v) const { return values_ ? values_[v] : 1.0; }
  double sum() const;  // in f64, in order

 private:
  const int64_t classes_;
  Scratch room_;
  const float* values_ = nullptr;
};

}  // namespace gptcore
