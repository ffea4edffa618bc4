// Matrix instructions of sm_80 and newer: ldmatrix, stmatrix (sm_90) and mma.sync m16n8k16 with float sums.
#pragma once

#include "cuda/primitives/memory.cuh"

namespace flashu::cuda {

// Four 8 x 8 matrices of 16-bit values; `row` is this lane's row of 16 bytes.
FLASHU_DEVICE void ldmatrix_x4(uint32_t (&out)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(out[0]), "=r"(out[1]), "=r"(out[2]), "=r"(out[3])
               : "r"(shared_address(row))
               : "memory");
}

// ldmatrix_x4 the other way; sm_90.
FLASHU_DEVICE void stmatrix_x4(void* row, const uint32_t (&in)[4]) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(shared_address(row)),
               "r"(in[0]), "r"(in[1]), "r"(in[2]), "r"(in[3])
               : "memory");
}

// sums += a b: a is [16, 16] by rows, b is [16, 8] by columns. With g = lane / 4 and t = lane % 4:
//   a[0..3]: rows g, g + 8, g, g + 8 at k = 2t (+ 8 for the last two), b[0..1]: column g at k = 2t (+ 8)
//   sums[0..3]: row g columns 2t, 2t + 1; row g + 8 columns 2t, 2t + 1
template <class T>
FLASHU_DEVICE void mma_16x8x16(float (&sums)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  if constexpr (std::is_same_v<T, bfloat16>) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  } else {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  }
}

}  // namespace flashu::cuda
