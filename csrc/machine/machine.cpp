// fast_transformer._machine: what is known of the processor and of the build, free of torch.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "features.h"
#include "peaks.h"

namespace py = pybind11;

namespace ft::machine {
namespace {

py::dict build_facts() {
  py::dict facts;
#if defined(__clang__)
  facts["compiler"] = "clang " __clang_version__;
#else
  facts["compiler"] = "gcc " __VERSION__;
#endif
  facts["flags"] = FT_BUILD_FLAGS;
  facts["torch"] = FT_BUILD_TORCH;
  return facts;
}

}  // namespace
}  // namespace ft::machine

PYBIND11_MODULE(_machine, m) {
  using namespace ft::machine;
  m.doc() = "The processor's instruction sets and measured peaks, and how this build was made.";
  m.def("cpu_features", &cpu_features,
        "Features that kernels may ask for, as both the processor and the system provide them.");
  m.def("supported_isas", &supported_isas,
        "Names of the instruction sets that this processor runs, best last.");

  const auto unlocked = py::call_guard<py::gil_scoped_release>();  // to measure many cores at once
  m.def("peak_flops", &peak_flops, py::arg("isa"), py::arg("dtype"), unlocked,
        "Floating-point operations a second of one core, on the kernels' own multiply-add.");
  m.def("read_bandwidth", &read_bandwidth, py::arg("isa"), py::arg("bytes"), unlocked,
        "Bytes a second that one core reads from a buffer of this size, again and again.");
  m.def("copy_bandwidth", &copy_bandwidth, py::arg("isa"), py::arg("bytes"), unlocked,
        "Bytes a second, read plus written, of one core that copies half of `bytes` to the other.");
  m.def("streaming_bandwidth", &streaming_bandwidth, py::arg("isa"), py::arg("bytes"), unlocked,
        "The same of a copy whose stores go past the caches, and need not read what they replace.");
  m.def("build_facts", &build_facts, "Compiler, flags and torch version of this build.");
}
