#include "kernels/attention/attention.h"

#include <tuple>

#include "bindings/tensor_caster.h"

namespace py = pybind11;
using gptcore::TensorView;

namespace {

// AttentionOptions from a tuple of its fields, in their order: one type for each.
using AttentionFields = std::tuple<float,       // softmax_scale
                                   bool,        // causal
                                   int64_t,     // left
                                   int64_t,     // right
                                   float,       // soft_cap
                                   TensorView,  // alibi_slopes
                                   TensorView,  // attn_mask
                                   TensorView,  // attn_bias
                                   TensorView,  // sinks
                                   double,      // dropout_p
                                   TensorView,  // seed
                                   int64_t,     // offset
                                   TensorView,  // prefix_lengths
                                   int64_t,     // sparse_stride
                                   int64_t      // sparse_summary
                                   >;

void attention_forward(const TensorView& q, const TensorView& k, const TensorView& v, const TensorView& cu_q,
                       const TensorView& cu_k, const AttentionFields& options, const TensorView& out,
                       const TensorView& lse) {
  gptcore::attention_forward(q, k, v, cu_q, cu_k, std::make_from_tuple<gptcore::AttentionOptions>(options),
                             out, lse);
}

void attention_backward(const TensorView& dout, const TensorView& q, const TensorView& k, const TensorView& v,
                        const TensorView& out, const TensorView& lse, const TensorView& cu_q,
                        const TensorView& cu_k, const AttentionFields& options, const TensorView& dq,
                        const TensorView& dk, const TensorView& dv, const TensorView& dlse,
                        const TensorView& dbias, const TensorView& dsinks) {
  gptcore::attention_backward(dout, q, k, v, out, lse, cu_q, cu_k,
                              std::make_from_tuple<gptcore::AttentionOptions>(options), dq, dk, dv, dlse,
                              dbias, dsinks);
}

}  // namespace

void register_attention(py::module_& m) {
  m.def("attention_forward", &attention_forward, py::arg("q"), py::arg("k"), py::arg("v"),
        py::arg("cu_seqlens_q"), py::arg("cu_seqlens_k"), py::arg("options"), py::arg("out"), py::arg("lse"),
        py::call_guard<py::gil_scoped_release_simple>(),
        "out = softmax(softmax_scale q k') v over the visible keys; writes lse where given. options: "
        "AttentionOptions, field by field.");
  m.def("attention_backward", &attention_backward, py::arg("dout"), py::arg("q"), py::arg("k"), py::arg("v"),
        py::arg("out"), py::arg("lse"), py::arg("cu_seqlens_q"), py::arg("cu_seqlens_k"), py::arg("options"),
        py::arg("dq"), py::arg("dk"), py::arg("dv"), py::arg("dlse"), py::arg("dbias"), py::arg("dsinks"),
        py::call_guard<py::gil_scoped_release_simple>(), "Gradients of attention_forward, overwritten.");
}
