// C API: versions of CUDA, and what is missing.
#include "core/cuda_versions.hpp"
#include "flashu/flashu.h"

#if FLASHU_HAS_CUDA
#include "cuda/versions.hpp"
#endif

namespace {

flashu::core::CudaVersions versions() {
#if FLASHU_HAS_CUDA
  return flashu::cuda::versions();
#else
  return {};
#endif
}

}  // namespace

extern "C" {

int32_t flashu_cuda_driver(void) { return versions().driver; }
int32_t flashu_cuda_runtime(void) { return versions().runtime; }
const char* flashu_cuda_problem(void) {
  static const std::string problem = flashu::core::driver_problem(versions());
  return problem.c_str();
}

}  // extern "C"
