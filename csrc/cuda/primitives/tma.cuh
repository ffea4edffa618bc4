// The tensor memory accelerator (sm_90): boxes of a matrix in global memory to and from shared memory.
#pragma once

#include "core/checks.hpp"
#include "cuda/primitives/mbarrier.cuh"

#if !FLASHU_EMULATED
#include <cuda.h>
#endif

namespace flashu::cuda {

// A row-major matrix of 16-bit values and the box of it that one copy moves. What a copy reads outside the
// matrix is zero, what it would write there is left out. Boxes are 64 columns (128 bytes) wide; in shared
// memory a box is its rows one after another, each row's eight 16-byte chunks exchanged: chunk c of row r
// stands at c ^ (r % 8) (128-byte swizzle, with the box at a multiple of 1024 bytes).
inline constexpr int kBoxColumns = 64;
inline constexpr int kBoxRowBytes = 128;

#if FLASHU_EMULATED
struct TensorMap {
  const char* base;
  int64_t rows, columns, stride;  // in values
  int box_rows;
};
#else
struct TensorMap {
  CUtensorMap map;
};
#endif

// What a matrix has to have: a base and rows at multiples of 16 bytes, rows that do not lie on each other.
inline bool tensor_map_can(const void* base, int64_t columns, int64_t stride) {
  return reinterpret_cast<uintptr_t>(base) % 16 == 0 && stride >= columns && stride > 0 && stride % 8 == 0 &&
         stride < (int64_t{1} << 39);
}

// Host. `stride` in values. Throws Failure where the driver refuses.
inline TensorMap encode_tensor_map(const void* base, int64_t rows, int64_t columns, int64_t stride,
                                   int box_rows) {
  FLASHU_CHECK(tensor_map_can(base, columns, stride) && rows >= 1 && columns >= 1 &&
                   rows <= (int64_t{1} << 32) && columns <= (int64_t{1} << 32) && box_rows >= 1 &&
                   box_rows <= 256,
               FLASHU_INTERNAL,
               "tensor map: expected 16-byte aligned rows and a box of at most 256 rows, got a matrix of ",
               rows, " x ", columns, ", stride ", stride, ", box of ", box_rows, " rows");
#if FLASHU_EMULATED
  return {static_cast<const char*>(base), rows, columns, stride, box_rows};
#else
  // Through the runtime, so that the library loads where there is no driver.
  static const auto encode = [] {
    void* function = nullptr;
    cudaDriverEntryPointQueryResult found{};
    const cudaError_t status = cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function, 12000,
                                                                cudaEnableDefault, &found);
    return status == cudaSuccess && found == cudaDriverEntryPointSuccess
               ? reinterpret_cast<decltype(&cuTensorMapEncodeTiled)>(function)
               : nullptr;
  }();
  FLASHU_CHECK(encode != nullptr, FLASHU_UNSUPPORTED, "tensor map: the driver has no cuTensorMapEncodeTiled");
  TensorMap result;
  const cuuint64_t sizes[2] = {static_cast<cuuint64_t>(columns), static_cast<cuuint64_t>(rows)};
  const cuuint64_t strides[1] = {static_cast<cuuint64_t>(stride) * 2};
  const cuuint32_t box[2] = {kBoxColumns, static_cast<cuuint32_t>(box_rows)};
  const cuuint32_t steps[2] = {1, 1};
  const CUresult status =
      encode(&result.map, CU_TENSOR_MAP_DATA_TYPE_UINT16, 2, const_cast<void*>(base), sizes, strides, box,
             steps, CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
             CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  FLASHU_CHECK(status == CUDA_SUCCESS, FLASHU_INTERNAL, "cuTensorMapEncodeTiled: error ",
               static_cast<int>(status));
  return result;
#endif
}

#if FLASHU_EMULATED
namespace emulated {

// Chunk `chunk` of row `row` of a box.
inline char* box_chunk(char* box, int row, int chunk) {
  const auto address =
      reinterpret_cast<uintptr_t>(box) + static_cast<uintptr_t>(row * kBoxRowBytes + chunk * 16);
  return reinterpret_cast<char*>(address ^ ((address >> 7 & 7) << 4));
}

inline void check_box(const void* box, const TensorMap& map, const char* what, const simt::Place& where) {
  if (reinterpret_cast<uintptr_t>(box) % 1024 != 0)
    simt::fail(where, std::string(what) + ": a swizzled box must begin at a multiple of 1024 bytes");
  if (!simt::in_shared(box, static_cast<std::size_t>(map.box_rows * kBoxRowBytes)))
    simt::fail(where, std::string(what) + ": the box is not in shared memory");
}

}  // namespace emulated
#endif

// One thread: begins to copy the box at (row, column) to shared memory; `barrier` counts its bytes.
FLASHU_DEVICE void tma_load(void* to, const TensorMap& map, int column, int row,
                            Mbarrier* barrier FLASHU_WHERE) {
#if FLASHU_EMULATED
  emulated::check_box(to, map, "TMA load", where);
  const int bytes = map.box_rows * kBoxRowBytes;
  auto* words = static_cast<uint64_t*>(to);
  for (int i = 0; i < bytes / 8; ++i) words[i] = ~uint64_t{0};  // undefined until it is there
  const simt::Unseen unseen;
  emulated::ask_bytes(barrier, bytes, where);
  simt::defer(simt::Kind::kLoad, [to, source = map, column, row, barrier, bytes] {
    for (int r = 0; r < source.box_rows; ++r) {
      for (int c = 0; c < kBoxColumns; ++c) {
        const int64_t y = int64_t{row} + r;
        const int64_t x = int64_t{column} + c;
        const bool inside = y >= 0 && y < source.rows && x >= 0 && x < source.columns;
        auto* value =
            reinterpret_cast<uint16_t*>(emulated::box_chunk(static_cast<char*>(to), r, c / 8)) + c % 8;
        *value = inside ? reinterpret_cast<const uint16_t*>(source.base)[y * source.stride + x] : uint16_t{0};
      }
    }
    emulated::complete_bytes(barrier, bytes);
  });
  simt::maybe_yield();
#else
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%2, "
      "%3}], [%4];" ::"r"(shared_address(to)),
      "l"(&map.map), "r"(column), "r"(row), "r"(shared_address(barrier))
      : "memory");
#endif
}

// One thread: begins to copy a box of shared memory to (row, column). What wrote the box must have fenced.
FLASHU_DEVICE void tma_store(const TensorMap& map, const void* from, int column, int row FLASHU_WHERE) {
#if FLASHU_EMULATED
  emulated::check_box(from, map, "TMA store", where);
  simt::check_proxy(from, static_cast<std::size_t>(map.box_rows * kBoxRowBytes), "TMA store", where);
  const simt::Unseen unseen;
  simt::bulk_groups().add(simt::defer(simt::Kind::kStore, [from, target = map, column, row] {
    auto* box = const_cast<char*>(static_cast<const char*>(from));
    for (int r = 0; r < target.box_rows; ++r) {
      for (int c = 0; c < kBoxColumns; ++c) {
        const int64_t y = int64_t{row} + r;
        const int64_t x = int64_t{column} + c;
        if (y < 0 || y >= target.rows || x < 0 || x >= target.columns) continue;
        auto* values = reinterpret_cast<uint16_t*>(const_cast<char*>(target.base));
        values[y * target.stride + x] =
            reinterpret_cast<const uint16_t*>(emulated::box_chunk(box, r, c / 8))[c % 8];
      }
    }
  }));
#else
  asm volatile(
      "cp.async.bulk.tensor.2d.global.shared::cta.tile.bulk_group [%0, {%2, %3}], [%1];" ::"l"(&map.map),
      "r"(shared_address(from)), "r"(column), "r"(row)
      : "memory");
#endif
}

FLASHU_DEVICE void tma_store_commit() {
#if FLASHU_EMULATED
  simt::bulk_groups().commit();
#else
  asm volatile("cp.async.bulk.commit_group;" ::: "memory");
#endif
}

// Returns when at most kPending of this thread's committed stores still read shared memory.
template <int kPending>
FLASHU_DEVICE void tma_store_wait_read() {
#if FLASHU_EMULATED
  simt::bulk_groups().wait(kPending);
#else
  asm volatile("cp.async.bulk.wait_group.read %0;" ::"n"(kPending) : "memory");
#endif
}

FLASHU_DEVICE void tma_prefetch(const TensorMap& map) {
#if !FLASHU_EMULATED
  asm volatile("prefetch.tensormap [%0];" ::"l"(&map.map) : "memory");
#else
  static_cast<void>(map);
#endif
}

}  // namespace flashu::cuda
