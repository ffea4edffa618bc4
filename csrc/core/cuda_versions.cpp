// The compatibility of drivers and runtimes.
#include "core/cuda_versions.hpp"

#include "core/checks.hpp"

namespace flashu::core {
namespace {

constexpr int kMajor = 1000;

// The first driver package of a major version, by NVIDIA's release notes; 0 where this source is older than
// it.
int first_driver(int runtime) {
  switch (runtime / kMajor) {
    case 12:
      return 525;
    case 13:
      return 580;
    default:
      return 0;
  }
}

}  // namespace

std::string version_text(int version) {
  return std::to_string(version / kMajor) + "." + std::to_string(version % kMajor / 10);
}

std::string driver_problem(const CudaVersions& versions) {
  if (versions.runtime == 0) return "this build has no CUDA kernels";
  if (versions.driver / kMajor >= versions.runtime / kMajor) return "";
  std::string wanted = version_text(versions.runtime / kMajor * kMajor) + " or newer";
  if (const int package = first_driver(versions.runtime); package != 0)
    wanted += " (version " + std::to_string(package) + ")";
  const std::string got =
      versions.driver == 0 ? "none" : "one for CUDA " + version_text(versions.driver) + ", which is too old";
  return "CUDA driver: expected one for CUDA " + wanted + ", since this build's runtime is CUDA " +
         version_text(versions.runtime) + ", got " + got;
}

void check_driver(const CudaVersions& versions) {
  const std::string problem = driver_problem(versions);
  FLASHU_CHECK(problem.empty(), FLASHU_UNSUPPORTED, problem);
}

}  // namespace flashu::core
