// Launching kernels from the host, and what the host may ask of a device.
#pragma once

#include <mutex>
#include <set>
#include <tuple>
#include <utility>

#include "core/checks.hpp"
#include "cuda/primitives/platform.cuh"

namespace flashu::cuda {

#if FLASHU_EMULATED
using Stream = void*;
#else
using Stream = cudaStream_t;

inline void check_cuda(cudaError_t status, const char* what) {
  FLASHU_CHECK(status == cudaSuccess, FLASHU_INTERNAL, what, ": ", cudaGetErrorString(status));
}
#endif

// What kernel choice depends on.
struct DeviceFacts {
  int multiprocessors;
  int capability;    // 90 for sm_90
  int shared_bytes;  // that one block may have
};

inline DeviceFacts device_facts(int device) {
#if FLASHU_EMULATED
  static_cast<void>(device);
  return {simt::settings().multiprocessors, simt::settings().capability, 227 << 10};
#else
  constexpr int kDevices = 64;
  static std::once_flag once[kDevices];
  static DeviceFacts facts[kDevices];
  FLASHU_CHECK(device >= 0 && device < kDevices, FLASHU_UNSUPPORTED, "device: expected one of the first ",
               kDevices, ", got ", device);
  std::call_once(once[device], [&] {
    int major = 0;
    int minor = 0;
    check_cuda(cudaDeviceGetAttribute(&facts[device].multiprocessors, cudaDevAttrMultiProcessorCount, device),
               "cudaDeviceGetAttribute");
    check_cuda(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device),
               "cudaDeviceGetAttribute");
    check_cuda(cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device),
               "cudaDeviceGetAttribute");
    check_cuda(
        cudaDeviceGetAttribute(&facts[device].shared_bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device),
        "cudaDeviceGetAttribute");
    facts[device].capability = 10 * major + minor;
  });
  return facts[device];
#endif
}

// Makes `device` current while it lives.
class DeviceGuard {
 public:
  explicit DeviceGuard(int device) {
#if FLASHU_EMULATED
    static_cast<void>(device);
#else
    check_cuda(cudaGetDevice(&previous_), "cudaGetDevice");
    if (previous_ == device) return;
    check_cuda(cudaSetDevice(device), "cudaSetDevice");
    changed_ = true;
#endif
  }
  ~DeviceGuard() {
#if !FLASHU_EMULATED
    if (changed_) static_cast<void>(cudaSetDevice(previous_));
#endif
  }
  DeviceGuard(const DeviceGuard&) = delete;
  DeviceGuard& operator=(const DeviceGuard&) = delete;

 private:
  [[maybe_unused]] int previous_ = 0;
  [[maybe_unused]] bool changed_ = false;
};

struct Launch {
  dim3 grid;
  dim3 block;
  int shared_bytes = 0;
  Stream stream = nullptr;
  // The kernel calls wait_for_previous() before it touches what the previous kernel of the stream wrote, so
  // it may begin while that one ends (sm_90; otherwise ignored).
  bool overlaps_previous = false;
};

// Where a kernel launched with overlaps_previous waits.
FLASHU_DEVICE void wait_for_previous() {
#if !FLASHU_EMULATED && defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// Allows the next kernel of the stream to begin; what this one writes afterwards is still waited for.
FLASHU_DEVICE void let_next_begin() {
#if !FLASHU_EMULATED && defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

// Throws Failure where the launch is refused. The arguments are copied, as by a real launch.
template <class... Parameters, class... Arguments>
void launch(const char* name, void (*kernel)(Parameters...), const Launch& how, Arguments&&... arguments) {
#if FLASHU_EMULATED
  std::tuple<std::decay_t<Parameters>...> copies(static_cast<Parameters>(arguments)...);
  const std::function<void()> body = [&] { std::apply(kernel, copies); };
  FLASHU_CHECK(simt::launch({how.grid.x, how.grid.y, how.grid.z}, {how.block.x, how.block.y, how.block.z},
                            static_cast<std::size_t>(how.shared_bytes), body),
               FLASHU_INTERNAL, name, ": invalid launch of ", how.grid.x, " x ", how.grid.y, " x ",
               how.grid.z, " blocks of ", how.block.x, " threads with ", how.shared_bytes,
               " bytes of shared memory");
#else
  if (how.shared_bytes > 48 * 1024) {
    // Once per kernel and device: the attribute belongs to the process, so setting it at every launch is a
    // race.
    static std::mutex mutex;
    static std::set<std::tuple<const void*, int, int> > raised;
    int device = 0;
    check_cuda(cudaGetDevice(&device), "cudaGetDevice");
    const std::tuple key{reinterpret_cast<const void*>(kernel), device, how.shared_bytes};
    const std::scoped_lock lock(mutex);
    if (!raised.contains(key)) {
      check_cuda(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, how.shared_bytes),
                 name);
      raised.insert(key);
    }
  }
  cudaLaunchAttribute attribute{};
  attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attribute.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = how.grid;
  config.blockDim = how.block;
  config.dynamicSmemBytes = static_cast<size_t>(how.shared_bytes);
  config.stream = how.stream;
  config.attrs = &attribute;
  config.numAttrs = how.overlaps_previous ? 1 : 0;
  check_cuda(cudaLaunchKernelEx(&config, kernel, static_cast<Parameters>(arguments)...), name);
#endif
}

}  // namespace flashu::cuda
