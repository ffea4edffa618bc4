// A matrix product by the tile that was chosen for it: halves of the FFN, and the linear layer.
#pragma once

#include <cstdint>

#include "core/ffn_choice.hpp"
#include "core/matrix.hpp"
#include "cuda/ffn_gemm.cuh"

#if !defined(FLASHU_HAS_SM90)
#define FLASHU_HAS_SM90 0
#endif

namespace flashu::cuda {

// Whether TMA takes the matrix; one that is absent is not in its way.
bool takes_tma(const core::Matrix& matrix, int64_t columns);

void run_gemm(const FfnGemm& gemm, const core::FfnTile& tile, int32_t type, Stream stream,
              int multiprocessors);

// The down half, and the sum of its parts where they have `memory`, of partials.bytes.
void project(FfnGemm down, const core::FfnTile& tile, const core::FfnPartials& partials, void* memory,
             int32_t type, Stream stream, int multiprocessors);

}  // namespace flashu::cuda
