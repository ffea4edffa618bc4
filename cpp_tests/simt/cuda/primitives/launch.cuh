// Launches that run in the emulator before they return, on a device that its settings describe.
#pragma once

#include <functional>
#include <string>
#include <tuple>
#include <type_traits>

#include "core/checks.hpp"
#include "core/cuda_versions.hpp"
#include "cuda/hardware.cuh"

namespace flashu::cuda {

inline core::CudaVersions cuda_versions() { return {simt::settings().driver, simt::settings().runtime}; }

inline DeviceFacts device_facts(int /*device*/) {
  core::check_driver(cuda_versions());
  return {simt::settings().multiprocessors, simt::settings().capability, 227 << 10};
}

class DeviceGuard {
 public:
  explicit DeviceGuard(int /*device*/) { core::check_driver(cuda_versions()); }
};

inline void griddepcontrol_wait() { simt::note_waited_for_previous(); }
inline void griddepcontrol_launch_dependents() {}

template <class... Parameters>
std::tuple<std::decay_t<Parameters>...> as_declared(void (*)(Parameters...),
                                                    const std::type_identity_t<Parameters>&... arguments) {
  return {arguments...};
}

template <auto kKernel>
int resident_clusters(const char* /*name*/, const LaunchConfig& config) {
  return simt::settings().multiprocessors / config.cluster;
}

// A kernel that may overlap the one before must wait for it in every thread.
template <auto kKernel, class... Arguments>
void launch(const char* name, const LaunchConfig& config, const Arguments&... arguments) {
  const auto copies = as_declared(kKernel, arguments...);
  const std::function<void()> body = [&] {
    std::apply(kKernel, copies);
    if (config.overlaps_previous && !simt::waited_for_previous())
      simt::fail(simt::Place::current(),
                 std::string(name) + " may overlap the kernel before, but does not wait for it");
  };
  FLASHU_CHECK(simt::launch({config.grid.x, config.grid.y, config.grid.z},
                            {config.block.x, config.block.y, config.block.z},
                            static_cast<std::size_t>(config.shared_bytes), body,
                            static_cast<unsigned>(config.cluster)),
               FLASHU_INTERNAL, name, ": invalid launch of ", config.grid.x, " x ", config.grid.y, " x ",
               config.grid.z, " blocks of ", config.block.x, " threads with ", config.shared_bytes,
               " bytes of shared memory, in clusters of ", config.cluster);
}

}  // namespace flashu::cuda
