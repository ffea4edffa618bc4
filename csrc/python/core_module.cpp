// pybind11 module flashu_ext._core over csrc/core: pure functions only, no tensors and no torch.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdint>
#include <map>
#include <string>
#include <vector>

#include "core/checks.hpp"
#include "core/cuda_versions.hpp"
#include "core/ffn_choice.hpp"
#include "core/parallel.hpp"
#include "core/run_list.hpp"
#include "core/tiles.hpp"
#include "cpu/gemm_kernels.hpp"
#include "flashu/flashu.h"

namespace py = pybind11;

namespace {

int32_t type_of(const std::string& dtype) {
  const std::map<std::string, int32_t> types = {
      {"fp32", FLASHU_F32}, {"bf16", FLASHU_BF16}, {"fp16", FLASHU_F16}};
  const auto type = types.find(dtype);
  if (type == types.end()) throw py::value_error("dtype: expected fp32, bf16 or fp16, got " + dtype);
  return type->second;
}

std::string explain_gemm(int64_t m, int64_t n, int64_t k, const std::string& dtype, bool gathered,
                         int64_t threads) {
  if (m < 0 || n < 0 || k < 0 || threads < 0) {
    throw py::value_error("explain_gemm: expected sizes >= 0");
  }
  const int32_t type = type_of(dtype);
  const flashu::cpu::GemmKernels& kernels = FLASHU_PICK_ISA(gemm_kernels);
  return flashu::core::explain_gemm_tiles({m, n, k, flashu::core::dtype_size(type), kernels.slot_values[type],
                                           threads ? threads : flashu::core::num_threads(), kernels.tile_rows,
                                           kernels.panel_columns, gathered});
}

std::string explain_ffn(int64_t rows, int64_t hidden, int64_t neurons, const std::string& dtype, bool listed,
                        int capability, int multiprocessors) {
  if (rows < 0 || hidden < 0 || neurons < 0) throw py::value_error("explain_ffn: expected sizes >= 0");
  if (capability < 80 || multiprocessors < 1) {
    throw py::value_error("explain_ffn: expected capability >= 80 and multiprocessors >= 1");
  }
  flashu::core::FfnQuestion question{};
  question.rows = rows;
  question.hidden = question.width = hidden;
  question.neurons = neurons;
  question.has_up = question.has_down = true;
  question.type = type_of(dtype);
  question.listed = listed;
  question.aligned = true;
  question.capability = capability;
  question.has_sm90 = true;
  question.multiprocessors = multiprocessors;
  return flashu::core::explain_ffn(question);
}

// "13.0" of 13000, "none" of 0.
std::string version_or_none(int32_t version) {
  return version == 0 ? "none" : flashu::core::version_text(version);
}

using Numbers = std::vector<int64_t>;

// The canonical form of flat runs, with the library's errors as ValueError and IndexError.
template <class Body>
auto translated(const Body& body) {
  try {
    return body();
  } catch (const flashu::core::Failure& failure) {
    if (failure.status == FLASHU_INVALID_INDEX) throw py::index_error(failure.message);
    throw py::value_error(failure.message);
  }
}

Numbers runs_from_index(const Numbers& index, int64_t limit) {
  return translated(
      [&] { return flashu::core::flat_from_runs(flashu::core::runs_from_index("index", index, limit)); });
}

Numbers index_from_runs(const Numbers& runs, int64_t limit) {
  return translated(
      [&] { return flashu::core::index_from_runs(flashu::core::runs_from_flat("runs", runs, limit)); });
}

template <flashu::core::RunList (*combine)(const flashu::core::RunList&, const flashu::core::RunList&)>
Numbers combined(const Numbers& a, const Numbers& b, int64_t limit) {
  using namespace flashu::core;
  return translated(
      [&] { return flat_from_runs(combine(runs_from_flat("a", a, limit), runs_from_flat("b", b, limit))); });
}

Numbers complement(const Numbers& runs, int64_t limit) {
  using namespace flashu::core;
  return translated(
      [&] { return flat_from_runs(flashu::core::complement(runs_from_flat("runs", runs, limit), limit)); });
}

Numbers round_out(const Numbers& runs, int64_t multiple, int64_t limit) {
  using namespace flashu::core;
  if (multiple < 1)
    throw py::value_error("multiple: expected a number >= 1, got " + std::to_string(multiple));
  return translated([&] {
    return flat_from_runs(flashu::core::round_out(runs_from_flat("runs", runs, limit), multiple, limit));
  });
}

}  // namespace

PYBIND11_MODULE(_core, m) {
  m.doc() = "Run lists, tile choice and build facts of libflashu.";
  m.def(
      "build_facts",
      [] {
        py::dict facts;
        facts["version"] = FLASHU_VERSION;
        facts["abi_version"] = flashu_abi_version();
        facts["compiler"] = __VERSION__;
        facts["cuda"] = FLASHU_CUDA_STATE;
        facts["cuda_driver"] = version_or_none(flashu_cuda_driver());
        facts["cuda_runtime"] = version_or_none(flashu_cuda_runtime());
        facts["cuda_ptx"] = FLASHU_PTX_VERSION;
        const std::string problem = flashu_cuda_problem();
        facts["cuda_missing"] = problem.empty() ? "nothing" : problem;
        facts["cpu_isa"] = flashu_cpu_isa();
        return facts;
      },
      "What this build is: version, abi_version, compiler, cuda (a sentence), the CUDA versions of the "
      "driver, of "
      "the runtime and of the PTX inside, what is missing to run on a GPU, cpu_isa in use.");
  m.def("explain_gemm", &explain_gemm, py::arg("m"), py::arg("n"), py::arg("k"), py::arg("dtype"),
        py::arg("gathered"), py::arg("threads") = 0,
        "A table of how [m, k] x [k, n] may be blocked on this CPU, the choice first; 0 "
        "threads: all.");

  m.def("explain_ffn", &explain_ffn, py::arg("rows"), py::arg("hidden"), py::arg("neurons"), py::arg("dtype"),
        py::arg("listed"), py::arg("capability") = 90, py::arg("multiprocessors") = 132,
        "Which CUDA kernels would serve a gathered FFN of contiguous operands, with predicted costs, the "
        "choice "
        "first.");

  // Run lists: flat (start, length) pairs over [0, limit), ascending and disjoint; results do not touch.
  m.def("runs_from_index", &runs_from_index, py::arg("index"), py::arg("limit"),
        "Runs of distinct indices in any order.");
  m.def("index_from_runs", &index_from_runs, py::arg("runs"), py::arg("limit"),
        "The indices that the runs hold.");
  m.def("unite", &combined<flashu::core::unite>, py::arg("a"), py::arg("b"), py::arg("limit"),
        "What is in a or b.");
  m.def("intersect", &combined<flashu::core::intersect>, py::arg("a"), py::arg("b"), py::arg("limit"),
        "What is in both.");
  m.def("complement", &complement, py::arg("runs"), py::arg("limit"),
        "What is in [0, limit) but not in runs.");
  m.def("round_out", &round_out, py::arg("runs"), py::arg("multiple"), py::arg("limit"),
        "Runs grown to multiples of `multiple`, clipped to the limit.");
}
