// The two worlds of a CUDA source: nvcc compiles it for a device, and g++ compiles the same file against the
// emulator of cpp_tests/simt, which runs it on the CPU. Every instruction that is not CUDA C++ has its device
// and its host meaning side by side in this folder; kernels are written once, on top of them.
#pragma once

#if defined(__CUDACC__)
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#define FLASHU_EMULATED 0
#define FLASHU_DEVICE __device__ __forceinline__
// Where a primitive was called; only the emulator wants to know.
#define FLASHU_WHERE
#define FLASHU_WHERE_ONLY
#else
#include "simt/cuda.hpp"
#define FLASHU_EMULATED 1
#define FLASHU_DEVICE inline
#define FLASHU_WHERE , const simt::Place& where = simt::Place::current()
#define FLASHU_WHERE_ONLY const simt::Place& where = simt::Place::current()
#endif

#include <cstdint>
#include <type_traits>

#include "core/half.hpp"

namespace flashu::cuda {

inline constexpr int kWarp = 32;
inline constexpr uint32_t kAllLanes = 0xffffffffu;

// Two neighbouring 16-bit values of a register, the lower address in the lower half.
template <class T>
FLASHU_DEVICE float2 unpack2(uint32_t bits) {
  return {to_float(T{static_cast<uint16_t>(bits & 0xffffu)}), to_float(T{static_cast<uint16_t>(bits >> 16)})};
}

template <class T>
FLASHU_DEVICE uint32_t pack2(float low, float high) {
#if defined(__CUDA_ARCH__)
  if constexpr (std::is_same_v<T, bfloat16>) {
    const __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
    return *reinterpret_cast<const uint32_t*>(&pair);
  } else {
    const __half2 pair = __floats2half2_rn(low, high);
    return *reinterpret_cast<const uint32_t*>(&pair);
  }
#else
  return static_cast<uint32_t>(from_float<T>(high).bits) << 16 | from_float<T>(low).bits;
#endif
}

}  // namespace flashu::cuda
