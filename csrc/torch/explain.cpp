// Ops without tensors: what this build is, and which kernels would serve a problem. All give text for people.
#include <sstream>
#include <string>

#include "core/checks.hpp"
#include "core/cuda_versions.hpp"
#include "core/ffn_choice.hpp"
#include "cpu/gemm.hpp"
#include "torch/common.hpp"

namespace flashu::torch_ops {
namespace {

int32_t type_of(const std::string& dtype) {
  if (dtype == "fp32") return FLASHU_F32;
  if (dtype == "bf16") return FLASHU_BF16;
  STD_TORCH_CHECK(dtype == "fp16", "flashu value error: dtype: expected fp32, bf16 or fp16, got ", dtype);
  return FLASHU_F16;
}

void check_sizes(const char* op, std::initializer_list<int64_t> sizes) {
  for (const int64_t size : sizes) {
    STD_TORCH_CHECK(size >= 0, "flashu value error: ", op, ": expected sizes >= 0, got ", size);
  }
}

// "13.0" of 13000, "none" of 0.
std::string version_or_none(int32_t version) { return version == 0 ? "none" : core::version_text(version); }

// A fact per line: its name, a tab, its text.
std::string build_facts() {
  std::ostringstream facts;
  facts << "version\t" << flashu_version() << "\nabi version\t" << flashu_abi_version() << "\ncompiler\t"
        << __VERSION__ << "\ncuda\t" << FLASHU_CUDA_STATE << "\ncuda driver\t"
        << version_or_none(flashu_cuda_driver()) << "\ncuda runtime\t"
        << version_or_none(flashu_cuda_runtime()) << "\ncuda ptx\t" << FLASHU_PTX_VERSION
        << "\ncuda missing\t" << (*flashu_cuda_problem() ? flashu_cuda_problem() : "nothing") << "\ncpu isa\t"
        << flashu_cpu_isa();
  return facts.str();
}

std::string explain_gemm(int64_t m, int64_t n, int64_t k, const std::string& dtype, bool gathered,
                         int64_t threads) {
  check_sizes("explain_gemm", {m, n, k, threads});
  return cpu::explain_gemm(m, n, k, type_of(dtype), gathered, threads);
}

std::string explain_ffn(int64_t rows, int64_t hidden, int64_t neurons, const std::string& dtype, bool listed,
                        int64_t capability, int64_t multiprocessors) {
  check_sizes("explain_ffn", {rows, hidden, neurons});
  STD_TORCH_CHECK(capability >= 80 && multiprocessors >= 1,
                  "flashu value error: explain_ffn: expected capability >= 80 and multiprocessors >= 1, got ",
                  capability, " and ", multiprocessors);
  core::FfnQuestion question{};
  question.rows = rows;
  question.hidden = question.width = hidden;
  question.neurons = neurons;
  question.has_up = question.has_down = true;
  question.type = type_of(dtype);
  question.listed = listed;
  question.block = 1;
  question.aligned = true;
  question.capability = static_cast<int>(capability);
  question.has_sm90 = true;
  question.multiprocessors = static_cast<int>(multiprocessors);
  return core::explain_ffn(question);
}

}  // namespace
}  // namespace flashu::torch_ops

FLASHU_OPS_IMPL(FLASHU_OPS_NAMESPACE, CompositeExplicitAutograd, m) {
  m.impl("build_facts", TORCH_BOX(&flashu::torch_ops::build_facts));
  m.impl("explain_gemm", TORCH_BOX(&flashu::torch_ops::explain_gemm));
  m.impl("explain_ffn", TORCH_BOX(&flashu::torch_ops::explain_ffn));
}
