// Launching kernels from the host, and what the host may ask of a device.
#pragma once

#include <atomic>
#include <mutex>

#include "core/checks.hpp"
#include "core/cuda_versions.hpp"
#include "cuda/hardware.cuh"

namespace flashu::cuda {

inline constexpr int kMaxDevices = 64;

inline core::CudaVersions cuda_versions() {
  core::CudaVersions versions;
  // They fail where there is no driver; the versions stay 0 then.
  static_cast<void>(cudaDriverGetVersion(&versions.driver));
  static_cast<void>(cudaRuntimeGetVersion(&versions.runtime));
  return versions;
}

inline void check_cuda(cudaError_t status, const char* what) {
  if (status == cudaSuccess) return;
  const core::CudaVersions versions = cuda_versions();
  // Devices that this build has no machine code for run its PTX, which a driver of the same major version may
  // be too old for.
  const char* const hint = status == cudaErrorUnsupportedPtxVersion
                               ? "; build with FLASHU_CUDA_ARCHS naming this device, or update the driver"
                               : "";
  core::fail(FLASHU_INTERNAL, what, ": ", cudaGetErrorString(status), " (driver for CUDA ",
             core::version_text(versions.driver), ", runtime ", core::version_text(versions.runtime), ")",
             hint);
}

// Before the first call that needs a driver.
inline void check_driver() {
  static const core::CudaVersions versions = cuda_versions();
  core::check_driver(versions);
}

inline DeviceFacts device_facts(int device) {
  check_driver();
  static std::once_flag once[kMaxDevices];
  static DeviceFacts facts[kMaxDevices];
  FLASHU_CHECK(device >= 0 && device < kMaxDevices, FLASHU_UNSUPPORTED, "device: expected one of the first ",
               kMaxDevices, ", got ", device);
  std::call_once(once[device], [&] {
    const auto attribute = [device](cudaDeviceAttr which) {
      int value = 0;
      check_cuda(cudaDeviceGetAttribute(&value, which, device), "cudaDeviceGetAttribute");
      return value;
    };
    facts[device] = {
        attribute(cudaDevAttrMultiProcessorCount),
        10 * attribute(cudaDevAttrComputeCapabilityMajor) + attribute(cudaDevAttrComputeCapabilityMinor),
        attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin)};
  });
  return facts[device];
}

// Makes `device` current while it lives.
class DeviceGuard {
 public:
  // A device of the C API.
  explicit DeviceGuard(int32_t device_code) {
    check_driver();
    const int device = core::cuda_ordinal(device_code);
    check_cuda(cudaGetDevice(&previous_), "cudaGetDevice");
    // Even where it is the current one: in a thread that has not used CUDA yet this is what binds its
    // context, and the first call may be one of the driver's, which does not.
    check_cuda(cudaSetDevice(device), "cudaSetDevice");
    changed_ = previous_ != device;
  }
  ~DeviceGuard() {
    if (changed_) static_cast<void>(cudaSetDevice(previous_));
  }
  DeviceGuard(const DeviceGuard&) = delete;
  DeviceGuard& operator=(const DeviceGuard&) = delete;

 private:
  int previous_ = 0;
  bool changed_ = false;
};

// Where a kernel launched with overlaps_previous waits.
FLASHU_DEVICE void griddepcontrol_wait() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// Allows the next kernel of the stream to begin; what this one writes afterwards is still waited for.
FLASHU_DEVICE void griddepcontrol_launch_dependents() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

// ---- launches

inline constexpr int kSharedWithoutAsking = 48 * 1024;

// What a launch has to know of a kernel on a device.
enum KernelState : uint8_t {
  kPrepared = 1,  // it may have all the shared memory of a block
  kWaits = 2,     // its code has griddepcontrol_wait()
};

// Allows a kernel all dynamic shared memory that its static memory leaves. Always the same amount, so it does
// not matter that threads whose first launches meet all set it: none lowers what another one needs.
inline uint8_t prepare(const char* name, const void* kernel, int device) {
  cudaFuncAttributes attributes{};
  check_cuda(cudaFuncGetAttributes(&attributes, kernel), name);
  const int bytes = device_facts(device).shared_bytes - static_cast<int>(attributes.sharedSizeBytes);
  check_cuda(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes), name);
  // Which code the device runs decides, not what it could run: code for sm_80 does not wait, on newer devices
  // too.
  return static_cast<uint8_t>(kPrepared | (attributes.ptxVersion >= 90 ? kWaits : 0));
}

// The state of a kernel on the current device, prepared by the first launch there.
template <auto kKernel>
uint8_t kernel_state(const char* name) {
  static std::atomic<uint8_t> states[kMaxDevices];
  int device = 0;
  check_cuda(cudaGetDevice(&device), "cudaGetDevice");
  FLASHU_CHECK(device < kMaxDevices, FLASHU_UNSUPPORTED, "device: expected one of the first ", kMaxDevices,
               ", got ", device);
  uint8_t state = states[device].load(std::memory_order_acquire);
  if (state == 0) {
    state = prepare(name, reinterpret_cast<const void*>(kKernel), device);
    states[device].store(state, std::memory_order_release);
  }
  return state;
}

template <class... Parameters>
cudaError_t launch_as_declared(void (*kernel)(Parameters...), const cudaLaunchConfig_t& config,
                               std::type_identity_t<Parameters>... arguments) {
  return cudaLaunchKernelEx(&config, kernel, arguments...);
}

// A launch as the runtime has it. Not copied: it points into itself.
struct RuntimeLaunch {
  cudaLaunchAttribute attributes[2] = {};
  cudaLaunchConfig_t config{};

  RuntimeLaunch(const LaunchConfig& from, bool may_overlap) {
    config.gridDim = from.grid;
    config.blockDim = from.block;
    config.dynamicSmemBytes = static_cast<size_t>(from.shared_bytes);
    config.stream = from.stream;
    config.attrs = attributes;
    if (may_overlap) {
      cudaLaunchAttribute& attribute = attributes[config.numAttrs++];
      attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
      attribute.val.programmaticStreamSerializationAllowed = 1;
    }
    if (from.cluster > 1) {
      cudaLaunchAttribute& attribute = attributes[config.numAttrs++];
      attribute.id = cudaLaunchAttributeClusterDimension;
      attribute.val.clusterDim.x = static_cast<unsigned>(from.cluster);
      attribute.val.clusterDim.y = attribute.val.clusterDim.z = 1;
    }
  }
  RuntimeLaunch(const RuntimeLaunch&) = delete;
  RuntimeLaunch& operator=(const RuntimeLaunch&) = delete;
};

// The clusters of such a launch that the current device runs at the same time. Asked for once a kernel and
// device: parts of the chip with fewer multiprocessors than others may leave some without a neighbour.
template <auto kKernel>
int resident_clusters(const char* name, const LaunchConfig& config) {
  static std::atomic<int> counts[kMaxDevices];
  int device = 0;
  check_cuda(cudaGetDevice(&device), "cudaGetDevice");
  static_cast<void>(kernel_state<kKernel>(name));
  int count = counts[device].load(std::memory_order_relaxed);
  if (count == 0) {
    const RuntimeLaunch to_runtime(config, false);
    check_cuda(
        cudaOccupancyMaxActiveClusters(&count, reinterpret_cast<const void*>(kKernel), &to_runtime.config),
        name);
    counts[device].store(count, std::memory_order_relaxed);
  }
  return count;
}

// Throws Failure where the launch is refused. The arguments are copied.
template <auto kKernel, class... Arguments>
void launch(const char* name, const LaunchConfig& config, const Arguments&... arguments) {
  const bool asks = config.shared_bytes > kSharedWithoutAsking || config.overlaps_previous;
  const uint8_t state = asks ? kernel_state<kKernel>(name) : 0;
  const RuntimeLaunch to_runtime(config, config.overlaps_previous && (state & kWaits) != 0);
  check_cuda(launch_as_declared(kKernel, to_runtime.config, arguments...), name);
}

}  // namespace flashu::cuda
