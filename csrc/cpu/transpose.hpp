// Transposing blocks in registers. Only kernel files (compiled once per instruction set) may include this.
#pragma once

#include "cpu/simd.hpp"

namespace flashu::cpu::FLASHU_ISA {

// Transposes a kWidth x kWidth block in registers: rows[i][j] -> rows[j][i].
#if defined(__AVX2__) && !defined(__AVX512F__)
FLASHU_INLINE void transpose(Floats (&rows)[kWidth]) {
  __m256 pairs[8];
  for (int i = 0; i < 8; i += 2) {
    pairs[i] = _mm256_unpacklo_ps((__m256)rows[i], (__m256)rows[i + 1]);
    pairs[i + 1] = _mm256_unpackhi_ps((__m256)rows[i], (__m256)rows[i + 1]);
  }
  __m256 quads[8];
  for (int i = 0; i < 8; i += 4) {
    quads[i] = _mm256_shuffle_ps(pairs[i], pairs[i + 2], 0x44);
    quads[i + 1] = _mm256_shuffle_ps(pairs[i], pairs[i + 2], 0xee);
    quads[i + 2] = _mm256_shuffle_ps(pairs[i + 1], pairs[i + 3], 0x44);
    quads[i + 3] = _mm256_shuffle_ps(pairs[i + 1], pairs[i + 3], 0xee);
  }
  for (int i = 0; i < 4; ++i) {
    rows[i] = (Floats)_mm256_permute2f128_ps(quads[i], quads[i + 4], 0x20);
    rows[i + 4] = (Floats)_mm256_permute2f128_ps(quads[i], quads[i + 4], 0x31);
  }
}
#elif defined(__AVX512F__)
FLASHU_INLINE void transpose(Floats (&rows)[kWidth]) {
  __m512 pairs[16];
#pragma GCC unroll 8
  for (int i = 0; i < 16; i += 2) {
    pairs[i] = _mm512_unpacklo_ps((__m512)rows[i], (__m512)rows[i + 1]);
    pairs[i + 1] = _mm512_unpackhi_ps((__m512)rows[i], (__m512)rows[i + 1]);
  }
  __m512 quads[16];
#pragma GCC unroll 4
  for (int i = 0; i < 16; i += 4) {
    quads[i] = _mm512_shuffle_ps(pairs[i], pairs[i + 2], 0x44);
    quads[i + 1] = _mm512_shuffle_ps(pairs[i], pairs[i + 2], 0xee);
    quads[i + 2] = _mm512_shuffle_ps(pairs[i + 1], pairs[i + 3], 0x44);
    quads[i + 3] = _mm512_shuffle_ps(pairs[i + 1], pairs[i + 3], 0xee);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    const __m512 even0 = _mm512_shuffle_f32x4(quads[i], quads[i + 4], 0x88);
    const __m512 odd0 = _mm512_shuffle_f32x4(quads[i], quads[i + 4], 0xdd);
    const __m512 even1 = _mm512_shuffle_f32x4(quads[i + 8], quads[i + 12], 0x88);
    const __m512 odd1 = _mm512_shuffle_f32x4(quads[i + 8], quads[i + 12], 0xdd);
    rows[i] = (Floats)_mm512_shuffle_f32x4(even0, even1, 0x88);
    rows[i + 8] = (Floats)_mm512_shuffle_f32x4(even0, even1, 0xdd);
    rows[i + 4] = (Floats)_mm512_shuffle_f32x4(odd0, odd1, 0x88);
    rows[i + 12] = (Floats)_mm512_shuffle_f32x4(odd0, odd1, 0xdd);
  }
}
#else
// Swaps the off-diagonal halves of ever smaller blocks.
FLASHU_INLINE void transpose(Floats (&rows)[kWidth]) {
#pragma GCC unroll 4
  for (int step = kWidth / 2; step >= 1; step /= 2) {
    Ints low{};
    Ints high{};
    for (int lane = 0; lane < kWidth; ++lane) {
      low[lane] = (lane & step) ? kWidth + lane - step : lane;
      high[lane] = (lane & step) ? kWidth + lane : lane + step;
    }
    for (int i = 0; i < kWidth; ++i) {
      if (i & step) continue;
      const Floats a = rows[i];
      const Floats b = rows[i + step];
      rows[i] = __builtin_shuffle(a, b, low);
      rows[i + step] = __builtin_shuffle(a, b, high);
    }
  }
}
#endif

}  // namespace flashu::cpu::FLASHU_ISA
