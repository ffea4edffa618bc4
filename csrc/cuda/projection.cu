// From a tile to the kernel that makes it.
#include "core/checks.hpp"
#include "cuda/ffn_sm90.hpp"
#include "cuda/ffn_sum.hpp"
#include "cuda/primitives/tma.cuh"
#include "cuda/projection.hpp"

namespace flashu::cuda {

bool takes_tma(const core::Matrix& matrix, int64_t columns) {
  return matrix.data == nullptr || tensor_map_can(matrix.data, columns, matrix.stride);
}

void run_gemm(const FfnGemm& g, const core::FfnTile& tile, int32_t type, Stream stream,
              [[maybe_unused]] int multiprocessors) {
  switch (tile.kernel) {
    case core::FfnKernel::kF32:
      return ffn_gemm_f32(g, stream);
    case core::FfnKernel::kSm80:
      return ffn_gemm_sm80(tile, g, type, stream);
    case core::FfnKernel::kSm90:
#if FLASHU_HAS_SM90
      return ffn_gemm_sm90(tile, g, type, stream, multiprocessors);
#else
      break;
#endif
  }
  core::fail(FLASHU_INTERNAL, "ffn: the kernel that was chosen is not in this build");
}

void project(FfnGemm down, const core::FfnTile& tile, const core::FfnPartials& partials, void* memory,
             int32_t type, Stream stream, int multiprocessors) {
  down.parts = core::ffn_parts(down.k - down.lead);
  if (partials.bytes > 0) {
    down.partial = static_cast<float*>(memory);
    down.partial_stride = partials.stride;
  }
  run_gemm(down, tile, type, stream, multiprocessors);
  if (down.partial == nullptr) return;
  ffn_sum({down.partial, down.parts, down.m, down.n, down.partial_stride, down.residual, down.residual_stride,
           down.out, down.out_stride, down.epilogue},
          type, stream);
}

}  // namespace flashu::cuda
