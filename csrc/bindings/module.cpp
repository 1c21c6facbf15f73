// _C: one register_<op>(m) line per op, and what Python may ask about the machine.
#include "bindings/tensor_caster.h"
#include "core/arena.h"
#include "core/device_link.h"
#include "core/fp32_precision.h"
#include "core/isa.h"
#include "core/parallel.h"

namespace py = pybind11;
using gptcore::TensorView;

void register_attention(py::module_& m);
void register_layer_norm(py::module_& m);
void register_crc32c(py::module_& m);
void register_cross_entropy(py::module_& m);
void register_linear_cross_entropy(py::module_& m);
void register_grouped_linear(py::module_& m);
void register_matmul(py::module_& m);
void register_gated_activation(py::module_& m);
void register_adamw(py::module_& m);
void register_adafactor(py::module_& m);
void register_adamw_8bit(py::module_& m);
void register_grad_norm(py::module_& m);
void register_sgd(py::module_& m);
void register_rotary(py::module_& m);
void register_embedding(py::module_& m);
void register_philox(py::module_& m);
void register_moe_dispatch(py::module_& m);
void register_moe_router(py::module_& m);
void register_rms_norm(py::module_& m);
void register_routing(py::module_& m);

namespace {

// Does nothing with three tensors: what crossing the boundary costs.
void noop(const TensorView&, const TensorView&, const TensorView&) {}

void register_machine(py::module_& m) {
  m.def("isa", [] { return gptcore::name_of(gptcore::current_isa()); }, "The instruction set in use.");
  m.def("set_isa", &gptcore::set_isa, py::arg("name"), "Use another instruction set of available_isas().");
  m.def(
      "available_isas",
      [] {
        py::list names;
        for (int i = 0; i < gptcore::kIsaCount; ++i) {
          const auto isa = static_cast<gptcore::Isa>(i);
          if (gptcore::has_isa(isa)) names.append(gptcore::name_of(isa));
        }
        return names;
      },
      "Instruction sets this machine can run, lowest first.");
  m.def("fp32_precision", &gptcore::fp32_precision, "How kernels on CUDA multiply f32: ieee or tf32.");
  m.def("set_fp32_precision", &gptcore::set_fp32_precision, py::arg("name"), "One of ieee and tf32.");
  m.def("num_threads", &gptcore::num_threads, "Threads that parallel loops use.");
  m.def("num_threads_reason", &gptcore::num_threads_reason, "Why num_threads() is what it is.");
  m.def("set_num_threads", &gptcore::set_num_threads, py::arg("count"), "0 returns to the default.");
  m.def("scratch_bytes", &gptcore::scratch_bytes, "Bytes held by the kernels' scratch stacks.");
  m.def(
      "attach_kernels",
      [](const py::capsule& capsule) {
        const auto* module = capsule.get_pointer<const gptcore::DeviceModule>();
        if (std::string(module->layout) != GPTCORE_LAYOUT) {
          throw py::import_error(
              "gptcore: the modules were built from different sources; rebuild both with 'pip install .'");
        }
        module->connect({&gptcore::device_call, &gptcore::device_memory});
        gptcore::attach_bodies(module->device, module->bodies);
      },
      py::arg("kernels"), "Take another module's kernels, a capsule of its kernels().");
  m.def(
      "kernel_tables",
      [](const py::capsule& capsule) {
        py::list names;
        for (const auto* b = capsule.get_pointer<const gptcore::DeviceModule>()->bodies; b; b = b->next) {
          names.append(b->name);
        }
        return names;
      },
      py::arg("kernels"), "Names of the tables of kernels in such a capsule, which stays unattached.");
  m.def("noop", &noop, py::arg("a"), py::arg("b"), py::arg("c"),
        py::call_guard<py::gil_scoped_release_simple>(),
        "An empty kernel over three tensors, to measure the boundary.");
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "gptcore's native kernels";
  m.attr("__version__") = GPTCORE_VERSION;
  py::register_local_exception_translator([](std::exception_ptr pointer) {
    try {
      if (pointer) std::rethrow_exception(pointer);
    } catch (const gptcore::TypeError& error) {
      PyErr_SetString(PyExc_TypeError, error.what());
    }
  });
  register_machine(m);
  register_attention(m);
  register_layer_norm(m);
  register_crc32c(m);
  register_cross_entropy(m);
  register_linear_cross_entropy(m);
  register_grouped_linear(m);
  register_matmul(m);
  register_gated_activation(m);
  register_adamw(m);
  register_adafactor(m);
  register_adamw_8bit(m);
  register_grad_norm(m);
  register_sgd(m);
  register_rotary(m);
  register_embedding(m);
  register_philox(m);
  register_moe_dispatch(m);
  register_moe_router(m);
  register_rms_norm(m);
  register_routing(m);
}
