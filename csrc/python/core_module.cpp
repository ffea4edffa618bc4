// pybind11 module flashu_ext._core over csrc/core: pure functions only, no tensors and no torch.
#include <pybind11/pybind11.h>

#include "flashu/flashu.h"

namespace py = pybind11;

PYBIND11_MODULE(_core, m) {
  m.doc() = "Run lists, tile choice and build facts of libflashu.";
  m.def("build_facts", [] {
    py::dict facts;
    facts["version"] = FLASHU_VERSION;
    facts["abi_version"] = flashu_abi_version();
    facts["compiler"] = __VERSION__;
    facts["cuda"] = FLASHU_CUDA_STATE;
    facts["cpu_isa"] = flashu_cpu_isa();
    return facts;
  }, "What this build is: version, abi_version, compiler, cuda (a sentence), cpu_isa in use.");
}
