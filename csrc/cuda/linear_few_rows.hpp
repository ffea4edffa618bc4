// The linear layer for at most core::kFewRows rows; see linear_few_rows.cu.
#pragma once

#include "cuda/ffn_gemm.cuh"

namespace flashu::cuda {

// `gemm`: a down half of all neurons. Rows may begin anywhere, and N and K have any size.
void linear_few_rows(const FfnGemm& gemm, int32_t type, Stream stream);

}  // namespace flashu::cuda
