#include "kernels/linear_cross_entropy/linear_cross_entropy_rows.h"

#include <pybind11/stl.h>

#include <array>
#include <tuple>

#include "bindings/tensor_caster.h"

namespace py = pybind11;
using gptcore::LinearCrossEntropyOptions;
using gptcore::TensorView;

namespace {

void forward(const TensorView& x, const TensorView& weight, const TensorView& targets, int64_t ignore_index,
             double label_smoothing, double z_loss, double logit_scale, const std::string& reduction,
             const TensorView& loss, const TensorView& z, const TensorView& logprobs, const TensorView& lse,
             const TensorView& dx, const TensorView& dweight, const TensorView& token_weight,
             const TensorView& bias, const TensorView& class_weight, std::optional<double> logit_soft_cap,
             const TensorView& dbias, const TensorView& entropy, const TensorView& predicted,
             int64_t first_class, int64_t num_classes) {
  const LinearCrossEntropyOptions options{ignore_index,   label_smoothing, z_loss,     logit_scale,
                                          reduction,      token_weight,    bias,       class_weight,
                                          logit_soft_cap, first_class,     num_classes};
  gptcore::linear_cross_entropy_forward(x, weight, targets, options,
                                        {loss, z, logprobs, lse, entropy, predicted}, {dx, dweight, dbias});
}

void backward(const TensorView& grad_loss, const TensorView& grad_z, const TensorView& x,
              const TensorView& weight, const TensorView& targets, const TensorView& lse,
              int64_t ignore_index, double label_smoothing, double z_loss, double logit_scale,
              const std::string& reduction, const TensorView& dx, const TensorView& dweight, bool accumulate,
              const TensorView& token_weight, const TensorView& bias, const TensorView& class_weight,
              std::optional<double> logit_soft_cap, const TensorView& dbias, int64_t first_class,
              int64_t num_classes) {
  const LinearCrossEntropyOptions options{ignore_index,   label_smoothing, z_loss,     logit_scale,
                                          reduction,      token_weight,    bias,       class_weight,
                                          logit_soft_cap, first_class,     num_classes};
  gptcore::linear_cross_entropy_backward(grad_loss, grad_z, x, weight, targets, lse, options,
                                         {dx, dweight, dbias}, accumulate);
}

// LinearCrossEntropyOptions from a tuple: the options of every call, then the tensors, the soft cap, the slice.
using Fields = std::tuple<int64_t, double, double, double, std::string, TensorView, TensorView, TensorView,
                          std::optional<double>, int64_t, int64_t>;

void check(const TensorView& x, const TensorView& weight, const TensorView& targets, const Fields& options,
           const std::array<TensorView, 6>& outputs, const std::array<TensorView, 3>& gradients) {
  const auto& [loss, z, logprobs, lse, entropy, predicted] = outputs;
  const auto& [dx, dweight, dbias] = gradients;
  gptcore::linear_cross_entropy_check(x, weight, targets,
                                      std::make_from_tuple<LinearCrossEntropyOptions>(options),
                                      {loss, z, logprobs, lse, entropy, predicted}, {dx, dweight, dbias});
}

void divisors(const TensorView& targets, int64_t classes, const Fields& options, const TensorView& out) {
  gptcore::linear_cross_entropy_divisors(targets, classes,
                                         std::make_from_tuple<LinearCrossEntropyOptions>(options), out);
}

void rows(const TensorView& products, const TensorView& targets, const Fields& options,
          const TensorView& divisors, const TensorView& row_loss, const TensorView& row_z,
          const TensorView& logprobs, const TensorView& lse, const TensorView& entropy,
          const TensorView& predicted, bool lse_given, const TensorView& grad_loss, const TensorView& grad_z,
          double missing, const TensorView& dlogits) {
  gptcore::linear_cross_entropy_rows(products, targets,
                                     std::make_from_tuple<LinearCrossEntropyOptions>(options),
                                     {divisors, row_loss, row_z, logprobs, lse, entropy, predicted, lse_given,
                                      grad_loss, grad_z, missing, dlogits});
}

}  // namespace

void register_linear_cross_entropy(py::module_& m) {
  m.def(
      "linear_cross_entropy_forward", &forward, py::arg("x"), py::arg("weight"), py::arg("targets"),
      py::arg("ignore_index"), py::arg("label_smoothing"), py::arg("z_loss"), py::arg("logit_scale"),
      py::arg("reduction"), py::arg("loss"), py::arg("z"), py::arg("logprobs"), py::arg("lse"),
      py::arg("dx") = py::none(), py::arg("dweight") = py::none(), py::arg("token_weight") = py::none(),
      py::arg("bias") = py::none(), py::arg("class_weight") = py::none(),
      py::arg("logit_soft_cap") = py::none(), py::arg("dbias") = py::none(), py::arg("entropy") = py::none(),
      py::arg("predicted") = py::none(), py::arg("first_class") = 0, py::arg("num_classes") = 0,
      py::call_guard<py::gil_scoped_release_simple>(),
      "Cross-entropy of x weight^T without the logits in memory; dx, dweight and dbias take its gradients.");
  m.def("linear_cross_entropy_backward", &backward, py::arg("grad_loss"), py::arg("grad_z"), py::arg("x"),
        py::arg("weight"), py::arg("targets"), py::arg("lse"), py::arg("ignore_index"),
        py::arg("label_smoothing"), py::arg("z_loss"), py::arg("logit_scale"), py::arg("reduction"),
        py::arg("dx"), py::arg("dweight"), py::arg("accumulate"), py::arg("token_weight") = py::none(),
        py::arg("bias") = py::none(), py::arg("class_weight") = py::none(),
        py::arg("logit_soft_cap") = py::none(), py::arg("dbias") = py::none(), py::arg("first_class") = 0,
        py::arg("num_classes") = 0, py::call_guard<py::gil_scoped_release_simple>(),
        "Gradients of linear_cross_entropy_forward; dweight is overwritten or added to.");
  m.def("linear_cross_entropy_check", &check, py::arg("x"), py::arg("weight"), py::arg("targets"),
        py::arg("options"), py::arg("outputs"), py::arg("gradients"),
        "Refuse what linear_cross_entropy would: outputs (loss, z, logprobs, lse, entropy, predicted), "
        "gradients (dx, "
        "dweight, dbias).");
  m.def("linear_cross_entropy_divisors", &divisors, py::arg("targets"), py::arg("classes"),
        py::arg("options"), py::arg("divisors"), py::call_guard<py::gil_scoped_release_simple>(),
        "What losses are divided by, on the device.");
  m.def("linear_cross_entropy_rows", &rows, py::arg("products"), py::arg("targets"), py::arg("options"),
        py::arg("divisors"), py::arg("row_loss"), py::arg("row_z"), py::arg("logprobs"), py::arg("lse"),
        py::arg("entropy"), py::arg("predicted"), py::arg("lse_given"), py::arg("grad_loss"),
        py::arg("grad_z"), py::arg("missing"), py::arg("dlogits"),
        py::call_guard<py::gil_scoped_release_simple>(),
        "Losses and gradients of some tokens from their products, on a device.");
  m.def("linear_cross_entropy_totals", &gptcore::linear_cross_entropy_totals, py::arg("row_loss"),
        py::arg("row_z"), py::arg("divisors"), py::arg("loss"), py::arg("z"),
        py::call_guard<py::gil_scoped_release_simple>(), "Loss and z from those of the rows, on a device.");
}
