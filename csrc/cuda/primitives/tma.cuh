// The tensor memory accelerator (sm_90): boxes of a matrix in global memory to and from shared memory.
#pragma once

#include <cuda.h>

#include "core/checks.hpp"
#include "cuda/primitives/mbarrier.cuh"

namespace flashu::cuda {

struct TensorMap {
  CUtensorMap map;
};

// Host. `stride` in values; a box as hardware.cuh has it. Throws Failure where the driver refuses.
inline TensorMap encode_tensor_map(const void* base, int64_t rows, int64_t columns, int64_t stride,
                                   int box_rows) {
  check_tensor_map(base, rows, columns, stride, box_rows);
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
}

// True in one lane of the warp, all of whose lanes are there. The compiler knows that it is one: of other
// conditions it does not, and puts each instruction of TMA behind them into a loop over the lanes.
FLASHU_DEVICE bool elect_one() {
  uint32_t elected;
  asm volatile("{\n\t.reg .pred p;\n\telect.sync _|p, 0xffffffff;\n\tselp.u32 %0, 1, 0, p;\n\t}"
               : "=r"(elected)::"memory");
  return elected != 0;
}

// One thread: begins to copy the box at (row, column) to shared memory; `barrier` counts its bytes.
FLASHU_DEVICE void tma_load(void* to, const TensorMap& map, int column, int row, Mbarrier* barrier) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%2, "
      "%3}], [%4];" ::"r"(shared_address(to)),
      "l"(&map.map), "r"(column), "r"(row), "r"(shared_address(barrier))
      : "memory");
}

// One thread: begins to copy a box of shared memory to (row, column). What wrote the box must have fenced.
FLASHU_DEVICE void tma_store(const TensorMap& map, const void* from, int column, int row) {
  asm volatile(
      "cp.async.bulk.tensor.2d.global.shared::cta.tile.bulk_group [%0, {%2, %3}], [%1];" ::"l"(&map.map),
      "r"(shared_address(from)), "r"(column), "r"(row)
      : "memory");
}

FLASHU_DEVICE void tma_store_commit() { asm volatile("cp.async.bulk.commit_group;" ::: "memory"); }

// Returns when at most kPending of this thread's committed stores still read shared memory.
template <int kPending>
FLASHU_DEVICE void tma_store_wait_read() {
  asm volatile("cp.async.bulk.wait_group.read %0;" ::"n"(kPending) : "memory");
}

FLASHU_DEVICE void tma_prefetch(const TensorMap& map) {
  asm volatile("prefetch.tensormap [%0];" ::"l"(&map.map) : "memory");
}

}  // namespace flashu::cuda
