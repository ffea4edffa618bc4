// Asks the runtime for its version and the driver's.
#include "cuda/primitives/launch.cuh"
#include "cuda/versions.hpp"

namespace flashu::cuda {

core::CudaVersions versions() { return cuda_versions(); }

}  // namespace flashu::cuda
