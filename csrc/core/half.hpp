// Storage types of 16 bits and their exact conversions, in plain integer arithmetic that compilers vectorise,
// or by the instructions of the CPU or GPU where there are any. Arithmetic is always done in float.
#pragma once

#include <bit>
#include <cstdint>

#if defined(__CUDACC__)
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#elif defined(__F16C__)
#include <immintrin.h>
#endif

// Kernel files are compiled for several instruction sets, so these must not become shared out-of-line
// symbols.
#if defined(__CUDACC__)
#define FLASHU_INLINE __host__ __device__ __forceinline__
#else
#define FLASHU_INLINE inline __attribute__((always_inline))
#endif

namespace flashu {

struct bfloat16 {
  uint16_t bits;
};
struct float16 {
  uint16_t bits;
};

FLASHU_INLINE float to_float(float value) { return value; }
FLASHU_INLINE float to_float(int8_t value) { return static_cast<float>(value); }
FLASHU_INLINE float to_float(bfloat16 value) {
  return std::bit_cast<float>(static_cast<uint32_t>(value.bits) << 16);
}

FLASHU_INLINE float to_float(float16 value) {
#if defined(__CUDA_ARCH__)
  return __half2float(__ushort_as_half(value.bits));
#elif defined(__F16C__)
  return _cvtsh_ss(value.bits);
#else
  // Shift the exponent into float's place and rescale; subnormals come out right because 2^112 is exact.
  const uint32_t sign = static_cast<uint32_t>(value.bits & 0x8000u) << 16;
  const uint32_t magnitude = static_cast<uint32_t>(value.bits & 0x7fffu) << 13;
  const float scaled = std::bit_cast<float>(magnitude) * 0x1p112f;
  const uint32_t special =
      (value.bits & 0x7c00u) == 0x7c00u ? (magnitude | 0x7f800000u) : std::bit_cast<uint32_t>(scaled);
  return std::bit_cast<float>(special | sign);
#endif
}

template <class T>
FLASHU_INLINE T from_float(float value);

template <>
FLASHU_INLINE float from_float<float>(float value) {
  return value;
}

// Round to nearest, ties to even; NaN stays NaN.
template <>
FLASHU_INLINE bfloat16 from_float<bfloat16>(float value) {
#if defined(__CUDA_ARCH__)
  return {__bfloat16_as_ushort(__float2bfloat16_rn(value))};
#else
  const uint32_t bits = std::bit_cast<uint32_t>(value);
  const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  const uint32_t quiet = (bits >> 16) | 0x40u;
  return {static_cast<uint16_t>((bits & 0x7fffffffu) > 0x7f800000u ? quiet : rounded)};
#endif
}

template <>
FLASHU_INLINE float16 from_float<float16>(float value) {
#if defined(__CUDA_ARCH__)
  return {__half_as_ushort(__float2half_rn(value))};
#elif defined(__F16C__)
  return {static_cast<uint16_t>(_cvtss_sh(value, _MM_FROUND_TO_NEAREST_INT))};
#else
  const uint32_t bits = std::bit_cast<uint32_t>(value);
  const uint32_t sign = (bits >> 16) & 0x8000u;
  const uint32_t magnitude = bits & 0x7fffffffu;
  if (magnitude > 0x7f800000u) return {static_cast<uint16_t>(sign | 0x7e00u)};
  if (magnitude >= 0x477ff000u) return {static_cast<uint16_t>(sign | 0x7c00u)};  // rounds to 65536 or more
  if (magnitude < 0x38800000u) {
    // Subnormal result: adding 0.5 makes the float adder round at 2^-24.
    const float shifted = std::bit_cast<float>(magnitude) + 0.5f;
    return {static_cast<uint16_t>(sign | (std::bit_cast<uint32_t>(shifted) - 0x3f000000u))};
  }
  const uint32_t rounded = magnitude + 0xfffu + ((magnitude >> 13) & 1u) - 0x38000000u;
  return {static_cast<uint16_t>(sign | (rounded >> 13))};
#endif
}

}  // namespace flashu
