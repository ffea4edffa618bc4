// The Hopper kernels of the gathered FFN, which exist only where FLASHU_HAS_SM90 says so.
#pragma once

#include <cstdint>

#include "cuda/ffn_gemm.cuh"

namespace flashu::cuda {

// `columns`: the width of a tile, from core::choose_sm90_columns(). All operands and the result must satisfy
// tensor_map_can(), and a list is for the up half only.
void ffn_gemm_sm90(const FfnGemm& gemm, int32_t type, int columns, Stream stream, int multiprocessors);

}  // namespace flashu::cuda
