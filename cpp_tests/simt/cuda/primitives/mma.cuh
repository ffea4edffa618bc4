// Matrix instructions: the lanes of a warp meet, and sums are added in the order of k.
#pragma once

#include "cuda/primitives/memory.cuh"

namespace flashu::cuda {

namespace emulated {

// ldmatrix / stmatrix: lane l names row l % 8 of matrix l / 8; a lane's register i holds two neighbours of
// row lane / 4 of matrix i.
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

FLASHU_DEVICE void ldmatrix_x4(uint32_t (&out)[4], const void* row FLASHU_WHERE) {
  const emulated::MatrixSlot slot = emulated::meet_rows(row, "ldmatrix", where);
  const unsigned lane = simt::lane();
  // Each lane reads its own words, so that a race shows as one of this thread.
  for (int i = 0; i < 4; ++i)
    out[i] = *reinterpret_cast<const uint32_t*>(slot.rows[i][lane / 4] + lane % 4 * 4);
}

FLASHU_DEVICE void stmatrix_x4(void* row, const uint32_t (&in)[4] FLASHU_WHERE) {
  const emulated::MatrixSlot slot = emulated::meet_rows(row, "stmatrix", where);
  const unsigned lane = simt::lane();
  for (int i = 0; i < 4; ++i) {
    char* word = const_cast<char*>(slot.rows[i][lane / 4]) + lane % 4 * 4;
    *reinterpret_cast<uint32_t*>(word) = in[i];
    simt::note_generic_write(word, 4);
  }
}

template <class T>
FLASHU_DEVICE void mma_16x8x16(float (&sums)[4], const uint32_t (&a)[4], uint32_t b0,
                               uint32_t b1 FLASHU_WHERE) {
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
}

}  // namespace flashu::cuda
