// Which NVIDIA drivers this build's CUDA runtime works with. Pure; versions are as CUDA counts them: 12080
// is 12.8.
#pragma once

#include <string>

#include "core/for_ops.hpp"

namespace flashu::core {

struct CudaVersions {
  int driver = 0;   // the newest CUDA that the driver knows; 0: there is no driver
  int runtime = 0;  // of this build; 0: it has no CUDA kernels
};

// "12.8".
FLASHU_FOR_OPS std::string version_text(int version);

// Why nothing can run, or "". A runtime works with drivers of its major version and newer ones.
std::string driver_problem(const CudaVersions& versions);

// Throws Failure (FLASHU_UNSUPPORTED) with the driver's problem.
void check_driver(const CudaVersions& versions);

}  // namespace flashu::core
