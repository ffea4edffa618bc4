// Matrix instructions of sm_80 and newer: ldmatrix, stmatrix (sm_90) and mma.sync m16n8k16 with float sums.
#pragma once

#include "cuda/primitives/memory.cuh"

namespace flashu::cuda {

#if FLASHU_EMULATED
namespace emulated {

// ldmatrix / stmatrix: lane l names row l % 8 of matrix l / 8; a lane's register i holds two neighbours of
// row lane / 4 of matrix i (transposed: of column lane / 4, one from each of two rows).
struct MatrixSlot {
  const char* own;
  const char* rows[4][8];
};
inline MatrixSlot meet_rows(const void* row, const char* kind, const simt::Place& where) {
  if (reinterpret_cast<uintptr_t>(row) % 16 != 0)
    simt::fail(where, std::string(kind) + ": a row is misaligned");
  if (!simt::in_shared(row, 16)) simt::fail(where, std::string(kind) + ": a row is not in shared memory");
  MatrixSlot slot{static_cast<const char*>(row), {}};
  simt::collective(
      kAllLanes, kind, &slot,
      [](void* const* slots) {
        for (int i = 0; i < kWarp; ++i) {
          for (int r = 0; r < kWarp; ++r)
            static_cast<MatrixSlot*>(slots[i])->rows[r / 8][r % 8] = static_cast<MatrixSlot*>(slots[r])->own;
        }
      },
      false, where);
  return slot;
}

}  // namespace emulated
#endif

// Four 8 x 8 matrices of 16-bit values; `row` is this lane's row of 16 bytes.
FLASHU_DEVICE void ldmatrix_x4(uint32_t (&out)[4], const void* row FLASHU_WHERE) {
#if FLASHU_EMULATED
  const emulated::MatrixSlot slot = emulated::meet_rows(row, "ldmatrix", where);
  const unsigned lane = simt::lane();
  // Each lane reads its own words, so that a race shows as one of this thread.
  for (int i = 0; i < 4; ++i)
    out[i] = *reinterpret_cast<const uint32_t*>(slot.rows[i][lane / 4] + lane % 4 * 4);
#else
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(out[0]), "=r"(out[1]), "=r"(out[2]), "=r"(out[3])
               : "r"(shared_address(row))
               : "memory");
#endif
}

// The same, each matrix transposed.
FLASHU_DEVICE void ldmatrix_x4_transposed(uint32_t (&out)[4], const void* row FLASHU_WHERE) {
#if FLASHU_EMULATED
  const emulated::MatrixSlot slot = emulated::meet_rows(row, "ldmatrix.trans", where);
  const unsigned lane = simt::lane();
  for (int i = 0; i < 4; ++i) {
    const auto at = [&](unsigned k) {
      return static_cast<uint32_t>(*reinterpret_cast<const uint16_t*>(slot.rows[i][k] + lane / 4 * 2));
    };
    out[i] = at(lane % 4 * 2 + 1) << 16 | at(lane % 4 * 2);
  }
#else
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(out[0]), "=r"(out[1]), "=r"(out[2]), "=r"(out[3])
               : "r"(shared_address(row))
               : "memory");
#endif
}

// ldmatrix_x4 the other way; sm_90.
FLASHU_DEVICE void stmatrix_x4(void* row, const uint32_t (&in)[4] FLASHU_WHERE) {
#if FLASHU_EMULATED
  const emulated::MatrixSlot slot = emulated::meet_rows(row, "stmatrix", where);
  const unsigned lane = simt::lane();
  for (int i = 0; i < 4; ++i) {
    char* word = const_cast<char*>(slot.rows[i][lane / 4]) + lane % 4 * 4;
    *reinterpret_cast<uint32_t*>(word) = in[i];
    simt::note_generic_write(word, 4);
  }
#else
  asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(shared_address(row)),
               "r"(in[0]), "r"(in[1]), "r"(in[2]), "r"(in[3])
               : "memory");
#endif
}

// sums += a b: a is [16, 16] by rows, b is [16, 8] by columns. With g = lane / 4 and t = lane % 4:
//   a[0..3]: rows g, g + 8, g, g + 8 at k = 2t (+ 8 for the last two), b[0..1]: column g at k = 2t (+ 8)
//   sums[0..3]: row g columns 2t, 2t + 1; row g + 8 columns 2t, 2t + 1
template <class T>
FLASHU_DEVICE void mma_16x8x16(float (&sums)[4], const uint32_t (&a)[4], uint32_t b0,
                               uint32_t b1 FLASHU_WHERE) {
#if FLASHU_EMULATED
  struct Slot {
    float* sums;
    const uint32_t* a;
    uint32_t b[2];
  } slot{sums, a, {b0, b1}};
  simt::collective(
      kAllLanes, "mma", &slot,
      [](void* const* slots) {
        float left[16][16];
        float right[8][16];
        for (int l = 0; l < kWarp; ++l) {
          const Slot& s = *static_cast<const Slot*>(slots[l]);
          const int g = l / 4;
          const int t = l % 4 * 2;
          for (int i = 0; i < 4; ++i) {
            const float2 pair = unpack2<T>(s.a[i]);
            left[g + i % 2 * 8][t + i / 2 * 8] = pair.x;
            left[g + i % 2 * 8][t + i / 2 * 8 + 1] = pair.y;
          }
          for (int i = 0; i < 2; ++i) {
            const float2 pair = unpack2<T>(s.b[i]);
            right[g][t + i * 8] = pair.x;
            right[g][t + i * 8 + 1] = pair.y;
          }
        }
        for (int l = 0; l < kWarp; ++l) {
          const Slot& s = *static_cast<const Slot*>(slots[l]);
          for (int i = 0; i < 4; ++i) {
            float sum = 0;
            for (int k = 0; k < 16; ++k) sum += left[l / 4 + i / 2 * 8][k] * right[l % 4 * 2 + i % 2][k];
            s.sums[i] += sum;
          }
        }
      },
      false, where);
#else
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
#endif
}

}  // namespace flashu::cuda
