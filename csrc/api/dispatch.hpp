// From checked arguments to the kernels of their device. csrc/api is the only folder that knows both cpu and
// cuda.
#pragma once

#include "core/checks.hpp"

namespace flashu::api {

// Calls `cpu` or `cuda`. In a build without CUDA kernels check_device() has refused other devices before.
template <class Cpu, class Cuda>
void run_on(int32_t device, const Cpu& cpu, [[maybe_unused]] const Cuda& cuda) {
#if FLASHU_HAS_CUDA
  if (device != FLASHU_DEVICE_CPU) return cuda();
#else
  static_cast<void>(device);
#endif
  cpu();
}

}  // namespace flashu::api
