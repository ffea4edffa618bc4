// Launching kernels from the host, and what the host may ask of a device.
#pragma once

#include <map>
#include <mutex>
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
    // Even where it is the current one: in a thread that has not used CUDA yet this is what binds its
    // context, and the first call may be one of the driver's, which does not.
    check_cuda(cudaSetDevice(device), "cudaSetDevice");
    changed_ = previous_ != device;
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
#if FLASHU_EMULATED
  simt::note_waited_for_previous();
#elif defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// Allows the next kernel of the stream to begin; what this one writes afterwards is still waited for.
FLASHU_DEVICE void let_next_begin() {
#if !FLASHU_EMULATED && defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

// What is known of a kernel on a device.
struct KernelState {
  int shared_bytes = 48 * 1024;  // dynamic shared memory that it may have
  bool waits = false;            // its code has wait_for_previous()
};

// Allows a kernel so much dynamic shared memory. The attribute is set, not raised, and belongs to the
// process: it must never be lowered for one launch while another one needs more.
inline KernelState prepare(const char* name, const void* kernel, int device, int shared_bytes) {
  static std::mutex mutex;
  static std::map<std::pair<const void*, int>, KernelState> states;
  const std::scoped_lock lock(mutex);
  const auto [found, first] = states.try_emplace({kernel, device});
  KernelState& state = found->second;
#if FLASHU_EMULATED
  static_cast<void>(name);
  static_cast<void>(first);
  if (shared_bytes > state.shared_bytes) {
    simt::set_shared_limit(kernel, static_cast<std::size_t>(shared_bytes));
    state.shared_bytes = shared_bytes;
  }
#else
  if (first) {
    // Which code the device runs decides, not what it could run: code for sm_80 does not wait, on newer
    // devices too.
    cudaFuncAttributes attributes{};
    check_cuda(cudaFuncGetAttributes(&attributes, kernel), name);
    state.waits = attributes.ptxVersion >= 90;
  }
  if (shared_bytes > state.shared_bytes) {
    check_cuda(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes), name);
    state.shared_bytes = shared_bytes;
  }
#endif
  return state;
}

// Throws Failure where the launch is refused. The arguments are copied, as by a real launch.
template <class... Parameters, class... Arguments>
void launch(const char* name, void (*kernel)(Parameters...), const Launch& how, Arguments&&... arguments) {
#if FLASHU_EMULATED
  std::tuple<std::decay_t<Parameters>...> copies(static_cast<Parameters>(arguments)...);
  const std::function<void()> body = [&] {
    std::apply(kernel, copies);
    if (how.overlaps_previous && !simt::waited_for_previous())
      simt::fail(simt::Place::current(),
                 std::string(name) + " may overlap the kernel before, but does not wait for it");
  };
  const auto* const identity = reinterpret_cast<const void*>(kernel);
  prepare(name, identity, 0, how.shared_bytes);
  FLASHU_CHECK(simt::launch({how.grid.x, how.grid.y, how.grid.z}, {how.block.x, how.block.y, how.block.z},
                            static_cast<std::size_t>(how.shared_bytes), body, identity),
               FLASHU_INTERNAL, name, ": invalid launch of ", how.grid.x, " x ", how.grid.y, " x ",
               how.grid.z, " blocks of ", how.block.x, " threads with ", how.shared_bytes,
               " bytes of shared memory");
#else
  int device = 0;
  check_cuda(cudaGetDevice(&device), "cudaGetDevice");
  const KernelState state = prepare(name, reinterpret_cast<const void*>(kernel), device, how.shared_bytes);
  cudaLaunchAttribute attribute{};
  attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attribute.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = how.grid;
  config.blockDim = how.block;
  config.dynamicSmemBytes = static_cast<size_t>(how.shared_bytes);
  config.stream = how.stream;
  config.attrs = &attribute;
  config.numAttrs = how.overlaps_previous && state.waits ? 1 : 0;
  check_cuda(cudaLaunchKernelEx(&config, kernel, static_cast<Parameters>(arguments)...), name);
#endif
}

}  // namespace flashu::cuda
