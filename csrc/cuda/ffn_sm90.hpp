// The Hopper kernels of the gathered FFN, which exist only where FLASHU_HAS_SM90 says so.
#pragma once

#include <cstdint>

#include "core/ffn_tiles.hpp"
#include "cuda/ffn_gemm.cuh"

namespace flashu::cuda {

// `tile`: one of core::kFfnTiles with the kernel kSm90; FLASHU_INTERNAL for any other. All operands and the
// result must satisfy tensor_map_can(). Tiles of the up half that take a list
// are kRuns, kBlocks and kRows; all of the down half take one of blocks of 64.
void ffn_gemm_sm90(const core::FfnTile& tile, const FfnGemm& gemm, int32_t type, Stream stream,
                   int multiprocessors);

}  // namespace flashu::cuda
