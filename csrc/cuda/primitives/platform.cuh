// CUDA C++ as nvcc compiles it, for all primitives of this folder. Kernels are written once, on top of them:
// g++ compiles the same kernels with the headers of the same names in cpp_tests/simt/cuda/primitives, which
// stand earlier in the include path there, and runs them on the CPU.
#pragma once

#if !defined(__CUDACC__)
#error "csrc/cuda/primitives is for nvcc; for g++, cpp_tests/simt must stand before csrc in the include path"
#endif

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>
#include <type_traits>

#include "core/half.hpp"

#define FLASHU_DEVICE __device__ __forceinline__

namespace flashu::cuda {

using Stream = cudaStream_t;

// Two neighbouring 16-bit values of a register, the lower address in the lower half.
template <class T>
FLASHU_DEVICE uint32_t pack2(float low, float high) {
  if constexpr (std::is_same_v<T, bfloat16>) {
    const __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
    return *reinterpret_cast<const uint32_t*>(&pair);
  } else {
    const __half2 pair = __floats2half2_rn(low, high);
    return *reinterpret_cast<const uint32_t*>(&pair);
  }
}

}  // namespace flashu::cuda
