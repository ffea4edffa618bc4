// What the hardware fixes for kernels and the host asks of a device: warps, launches, the boxes of the tensor
// memory accelerator, and the layouts of wgmma's operands. The same for the device's primitives and for the
// emulator's.
#pragma once

#include <cstdint>

#include "core/checks.hpp"
#include "core/half.hpp"
#include "cuda/primitives/platform.cuh"

namespace flashu::cuda {

inline constexpr int kWarp = 32;
inline constexpr uint32_t kAllLanes = 0xffffffffu;

// Two neighbouring 16-bit values of a register, the lower address in the lower half.
template <class T>
FLASHU_DEVICE float2 unpack2(uint32_t bits) {
  return {to_float(T{static_cast<uint16_t>(bits & 0xffffu)}), to_float(T{static_cast<uint16_t>(bits >> 16)})};
}

// ---- launches

// What kernel choice depends on.
struct DeviceFacts {
  int multiprocessors;
  int capability;    // 90 for sm_90
  int shared_bytes;  // that one block may have
};

struct LaunchConfig {
  dim3 grid;
  dim3 block;
  int shared_bytes = 0;
  Stream stream = nullptr;
  // The kernel calls griddepcontrol_wait() before it touches what the previous kernel of the stream wrote, so
  // it may begin while that one ends (sm_90; otherwise ignored).
  bool overlaps_previous = false;
  int cluster = 1;  // blocks of one, neighbours along x (sm_90); the grid is a multiple of it
};

// ---- the tensor memory accelerator

// A tensor map describes a row-major matrix of 16-bit values and the box of it that one copy moves. A copy
// begins at a column that is a multiple of 8 (16 bytes); any other is an illegal instruction. What it reads
// outside the matrix is zero. What it would write there is left out, but only by whole chunks of 16 bytes:
// where the number of columns is no multiple of 8, a store reaches up to 7 values past the last one. Boxes
// are 64 columns (128 bytes) wide; in shared memory a box is its rows one after another, each row's eight
// 16-byte chunks exchanged: chunk c of row r stands at c ^ (r % 8) (128-byte swizzle, with the box at a
// multiple of 1024 bytes).
inline constexpr int kChunkColumns = 8;
inline constexpr int kBoxColumns = 64;
inline constexpr int kBoxRowBytes = 128;

// What a matrix has to have: a base and rows at multiples of 16 bytes, rows that do not lie on each other.
inline bool tensor_map_can(const void* base, int64_t columns, int64_t stride) {
  return reinterpret_cast<uintptr_t>(base) % 16 == 0 && stride >= columns && stride > 0 && stride % 8 == 0 &&
         stride < (int64_t{1} << 39);
}

// Throws Failure for what encode_tensor_map() does not take.
inline void check_tensor_map(const void* base, int64_t rows, int64_t columns, int64_t stride, int box_rows) {
  FLASHU_CHECK(tensor_map_can(base, columns, stride) && rows >= 1 && columns >= 1 &&
                   rows <= (int64_t{1} << 32) && columns <= (int64_t{1} << 32) && box_rows >= 1 &&
                   box_rows <= 256,
               FLASHU_INTERNAL,
               "tensor map: expected 16-byte aligned rows and a box of at most 256 rows, got a matrix of ",
               rows, " x ", columns, ", stride ", stride, ", box of ", box_rows, " rows");
}

// ---- wgmma

// An operand lies in shared memory as a box (above): a row of A, or a column of the product for B, with 64
// values of K. The 64-bit descriptor of one at `address`, which moves 32 bytes inside a box for every 16 of
// K.
FLASHU_DEVICE uint64_t operand_descriptor(uint64_t address) {
  // Bits 0-13: address / 16. 16-29: leading offset / 16, unused here. 32-45: stride offset / 16, from one
  // group of 8 rows to the next. 62-63 = 1: 128-byte swizzle.
  return (address & 0x3ffff) / 16 | uint64_t{1} << 16 | uint64_t{1024 / 16} << 32 | uint64_t{1} << 62;
}

}  // namespace flashu::cuda
