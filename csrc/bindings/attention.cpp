#include "kernels/attention/attention.h"

#include <tuple>
#include <type_traits>
#include <utility>

#include "bindings/torch_function.h"

namespace py = pybind11;
using gptcore::TensorView;
using gptcore::bindings::last_contiguous;
using gptcore::bindings::Operand;
using gptcore::bindings::operand;

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

void attention_paged(const TensorView& q, const TensorView& k_pages, const TensorView& v_pages,
                     const TensorView& block_table, const TensorView& cache_seqlens,
                     const AttentionFields& options, const TensorView& out, const TensorView& lse) {
  gptcore::attention_paged(q, k_pages, v_pages, block_table, cache_seqlens,
                           std::make_from_tuple<gptcore::AttentionOptions>(options), out, lse);
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

// --- hooks of autograd for calls whose options are no tensors ---------------------------------------------------

constexpr size_t kFields = std::tuple_size_v<AttentionFields>;

template <class Field>
bool is_given_tensor(PyObject* x) {
  return std::is_same_v<Field, TensorView> && x != Py_None;
}

template <class Field>
Field number(PyObject* x) {
  if constexpr (std::is_same_v<Field, TensorView>) {
    return {};
  } else {
    return py::cast<Field>(py::handle(x));
  }
}

template <size_t... kField>
bool any_tensor(PyObject* const* x, std::index_sequence<kField...>) {
  return (is_given_tensor<std::tuple_element_t<kField, AttentionFields>>(x[kField]) || ...);
}

template <size_t... kField>
gptcore::AttentionOptions numbers(PyObject* const* x, std::index_sequence<kField...>) {
  return {number<std::tuple_element_t<kField, AttentionFields>>(x[kField])...};
}

// (ctx, inputs): (q, k, v, cu_seqlens_q, cu_seqlens_k, <options>, want_lse); None where it is not for such a call.
py::object attention_eager_forward(PyObject* const* arguments) {
  constexpr auto kEach = std::make_index_sequence<kFields>();
  PyObject* const* inputs = reinterpret_cast<PyTupleObject*>(arguments[1])->ob_item;
  PyObject* const* given = inputs + 5;
  if (given[kFields] == Py_True || any_tensor(given, kEach)) return py::none();
  const Operand q = last_contiguous(inputs[0]);
  if (q.view().ndim != 4) return py::none();
  const int64_t sizes[] = {q.view().size(0), q.view().size(2), q.view().size(1)};
  const Operand k = last_contiguous(inputs[1]), v = last_contiguous(inputs[2]), cu_q = operand(inputs[3]),
                cu_k = operand(inputs[4]), out = q.empty_like(), lse = q.new_empty(sizes, 3, true);
  const gptcore::AttentionOptions options = numbers(given, kEach);
  gptcore::bindings::save_for_backward(arguments[0], q.tensor(), k.tensor(), v.tensor(), out.tensor(),
                                       lse.tensor(), cu_q.tensor(), cu_k.tensor());
  gptcore::bindings::set_attribute(
      arguments[0], gptcore::bindings::options_name(),
      gptcore::bindings::checked(PyTuple_GetSlice(arguments[1], 5, 5 + Py_ssize_t{kFields})));
  {
    const py::gil_scoped_release_simple release;
    gptcore::attention_forward(q.view(), k.view(), v.view(), cu_q.view(), cu_k.view(), options, out.view(),
                               lse.view());
  }
  return out.tensor();
}

// (ctx, grad_out) after attention_eager_forward.
py::object attention_eager_backward(PyObject* const* arguments) {
  const py::tuple saved = gptcore::bindings::saved_tensors(arguments[0]),
                  given = gptcore::bindings::attribute(arguments[0], gptcore::bindings::options_name());
  const Operand dout = last_contiguous(arguments[1]), q(saved[0]), k(saved[1]), v(saved[2]), out(saved[3]),
                lse(saved[4]), cu_q(saved[5]), cu_k(saved[6]), dq = q.empty_like(), dk = k.empty_like(),
                dv = v.empty_like();
  const gptcore::AttentionOptions options =
      numbers(reinterpret_cast<PyTupleObject*>(given.ptr())->ob_item, std::make_index_sequence<kFields>());
  {
    const py::gil_scoped_release_simple release;
    gptcore::attention_backward(dout.view(), q.view(), k.view(), v.view(), out.view(), lse.view(),
                                cu_q.view(), cu_k.view(), options, dq.view(), dk.view(), dv.view(), {}, {},
                                {});
  }
  py::tuple gradients(kFields + 6);
  for (size_t i = 3; i < kFields + 6; ++i) gradients[i] = py::none();
  gradients[0] = dq.tensor(), gradients[1] = dk.tensor(), gradients[2] = dv.tensor();
  return gradients;
}

}  // namespace

void register_attention(py::module_& m) {
  m.def("attention_forward", &attention_forward, py::arg("q"), py::arg("k"), py::arg("v"),
        py::arg("cu_seqlens_q"), py::arg("cu_seqlens_k"), py::arg("options"), py::arg("out"), py::arg("lse"),
        py::call_guard<py::gil_scoped_release_simple>(),
        "out = softmax(softmax_scale q k') v over the visible keys; writes lse where given. options: "
        "AttentionOptions, field by field.");
  m.def("attention_paged", &attention_paged, py::arg("q"), py::arg("k_pages"), py::arg("v_pages"),
        py::arg("block_table"), py::arg("cache_seqlens"), py::arg("options"), py::arg("out"), py::arg("lse"),
        py::call_guard<py::gil_scoped_release_simple>(),
        "attention_forward over a cache in pages: key s of sequence b lies in page block_table[b, s div "
        "page_size].");
  m.def("attention_backward", &attention_backward, py::arg("dout"), py::arg("q"), py::arg("k"), py::arg("v"),
        py::arg("out"), py::arg("lse"), py::arg("cu_seqlens_q"), py::arg("cu_seqlens_k"), py::arg("options"),
        py::arg("dq"), py::arg("dk"), py::arg("dv"), py::arg("dlse"), py::arg("dbias"), py::arg("dsinks"),
        py::call_guard<py::gil_scoped_release_simple>(), "Gradients of attention_forward, overwritten.");
  gptcore::bindings::define_hooks<attention_eager_forward, 1, attention_eager_backward>(
      m, "attention", "inputs: tuple", "grad_out: object");
}
