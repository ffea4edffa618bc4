// Vectors of the CPU kernels: kWidth floats in GCC/Clang vector types, so one source serves every instruction
// set. Only kernel files (compiled once per set) may include this.
#pragma once

#include <cstdint>
#include <cstring>

#include "core/half.hpp"

#if defined(__AVX2__)
#include <immintrin.h>
#endif

namespace flashu::cpu::FLASHU_ISA {

#if defined(__AVX512F__)
inline constexpr int kWidth = 16;
#elif defined(__AVX2__)
inline constexpr int kWidth = 8;
#else
inline constexpr int kWidth = 4;
#endif

typedef float Floats __attribute__((vector_size(4 * kWidth)));
typedef int32_t Ints __attribute__((vector_size(4 * kWidth)));
typedef uint32_t Words __attribute__((vector_size(4 * kWidth)));
typedef uint16_t Halves __attribute__((vector_size(2 * kWidth)));

// Moves a value of one type from or to unaligned memory.
template <class V>
FLASHU_INLINE V load_as(const void* from) {
  V value;
  std::memcpy(&value, from, sizeof(V));
  return value;
}
template <class V>
FLASHU_INLINE void store_as(void* to, V value) {
  std::memcpy(to, &value, sizeof(V));
}

FLASHU_INLINE Floats load(const float* from) { return load_as<Floats>(from); }
FLASHU_INLINE Floats load(const int8_t* from) {
#if defined(__AVX512F__)
  return (Floats)_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(load_as<__m128i>(from)));
#elif defined(__AVX2__)
  return (Floats)_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_cvtsi64_si128(load_as<int64_t>(from))));
#else
  Floats wide;
  for (int i = 0; i < kWidth; ++i) wide[i] = to_float(from[i]);
  return wide;
#endif
}
FLASHU_INLINE Floats load(const bfloat16* from) {
  const Words wide = __builtin_convertvector(load_as<Halves>(from), Words) << 16;
  return (Floats)wide;
}
FLASHU_INLINE Floats load(const float16* from) {
#if defined(__AVX512F__)
  return (Floats)_mm512_cvtph_ps(load_as<__m256i>(from));
#elif defined(__AVX2__)
  return (Floats)_mm256_cvtph_ps(load_as<__m128i>(from));
#else
  Floats wide;
  for (int i = 0; i < kWidth; ++i) wide[i] = to_float(from[i]);
  return wide;
#endif
}

FLASHU_INLINE void store(float* to, Floats value) { store_as(to, value); }
FLASHU_INLINE void store(bfloat16* to, Floats value) {
  const Words bits = (Words)value;
  const Words rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  const Words quiet = (bits >> 16) | 0x40u;
  const Words chosen = (bits & 0x7fffffffu) > 0x7f800000u ? quiet : rounded;
  store_as(to, __builtin_convertvector(chosen, Halves));
}
FLASHU_INLINE void store(float16* to, Floats value) {
#if defined(__AVX512F__)
  store_as(to, _mm512_cvtps_ph((__m512)value, _MM_FROUND_TO_NEAREST_INT));
#elif defined(__AVX2__)
  store_as(to, _mm256_cvtps_ph((__m256)value, _MM_FROUND_TO_NEAREST_INT));
#else
  for (int i = 0; i < kWidth; ++i) to[i] = from_float<float16>(value[i]);
#endif
}

// e^x within about one unit in the last place; overflow to infinity, underflow to a tiny number or zero, NaN
// to NaN.
FLASHU_INLINE Floats exponential(Floats x) {
  x = x > 89.0f ? Floats{} + 89.0f : x;
  x = x < -104.0f ? Floats{} - 104.0f : x;
  const Floats magic = Floats{} + 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer
  const Floats shifted = x * 1.44269504088896341f + magic;
  const Floats n = shifted - magic;
  Floats r = x - n * 0.693359375f;
  r = r + n * 2.12194440e-4f;  // ln 2 = 0.693359375 - 2.12194440e-4
  Floats p = Floats{} + 1.9875691500e-4f;
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * (r * r) + r + 1.0f;
  // 2^n in two factors, because n reaches 128 and -150.
  const Ints whole = (Ints)shifted - (Ints)magic;
  const Ints half = whole >> 1;
  const Floats first = (Floats)((half + 127) << 23);
  const Floats second = (Floats)((whole - half + 127) << 23);
  return p * first * second;
}

// x / (1 + e^-x)
FLASHU_INLINE Floats silu(Floats x) { return x / (1.0f + exponential(-x)); }

// x (1 + tanh(u)) / 2 = x / (1 + e^-2u), u = sqrt(2 / pi) (x + 0.044715 x^3)
FLASHU_INLINE Floats gelu_tanh(Floats x) {
  const Floats twice_u = x * (1.59576912160573071f + 0.0713548162726002527f * (x * x));
  return x / (1.0f + exponential(-twice_u));
}

// x (1 + erf(x / sqrt(2))) / 2, from the tail erfc(a) / 2 of a = |x| / sqrt(2), which loses no digits where x
// is negative. (1 + 2 a) e^(a^2) erfc(a) is nearly constant, and a polynomial in q = (a - 2) / (a + 2): the
// form of Shepherd and Laframboise, Math. Comp. 36 (1981); the coefficients are fitted, within 2e-8. The
// error is below 1.2e-7 max(1, |x|).
FLASHU_INLINE Floats gelu(Floats x) {
  Floats a = (x < 0.0f ? -x : x) * 0.707106781186547524f;
  a = a > 16.0f ? Floats{} + 16.0f : a;  // the tail is 0 there
  const Floats q = (a - 2.0f) / (a + 2.0f);
  Floats p = Floats{} - 1.9534161122e-04f;
  p = p * q - 6.0665297205e-04f;
  p = p * q + 6.5552015607e-04f;
  p = p * q + 4.3087698643e-03f;
  p = p * q - 4.0309703335e-03f;
  p = p * q - 2.7100237209e-02f;
  p = p * q + 8.2028005280e-02f;
  p = p * q - 8.3015882872e-02f;
  p = p * q - 4.6382008684e-02f;
  p = p * q + 6.3848919918e-01f;
  const Floats tail = exponential(a * -a) * (p / (1.0f + 2.0f * a));
  return x * (x > 0.0f ? 1.0f - tail : tail);
}

}  // namespace flashu::cpu::FLASHU_ISA
