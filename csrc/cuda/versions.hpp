// Versions of the CUDA driver and of this build's runtime.
#pragma once

#include "core/cuda_versions.hpp"

namespace flashu::cuda {

core::CudaVersions versions();

}  // namespace flashu::cuda
