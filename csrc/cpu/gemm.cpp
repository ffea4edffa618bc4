// Packing of the left operand over threads, and what the choice of tiles is for people.
#include "cpu/gemm.hpp"

namespace flashu::cpu {

void pack_rows(const GemmKernels& kernels, const PackedRows& packed, const void* x, int32_t type,
               int64_t stride, int64_t k) {
  const int64_t bytes = element_bytes(type);
  const int64_t values = kernels.slot_values[type];
  const int64_t grain = std::max<int64_t>(1, 65536 / (packed.tile_rows * std::max<int64_t>(k, 1)));
  core::parallel_for(0, packed.tiles(), grain, [&](int64_t first, int64_t last) {
    for (int64_t slot = 0; slot < packed.slots; slot += packed.block_k) {
      const int64_t begin = slot * values;
      const int64_t count = std::min(packed.block_k * values, k - begin);
      for (int64_t tile = first; tile < last; ++tile) {
        const char* source = static_cast<const char*>(x) + (tile * packed.tile_rows * stride + begin) * bytes;
        kernels.pack_rows[type](packed.at(tile, slot), source, stride, packed.rows_in(tile), count);
      }
    }
  });
}

std::string explain_gemm(int64_t m, int64_t n, int64_t k, int32_t type, bool gathered, int64_t threads) {
  const GemmKernels& kernels = FLASHU_PICK_ISA(gemm_kernels);
  return core::explain_gemm_tiles({m, n, k, element_bytes(type), kernels.slot_values[type],
                                   threads ? threads : core::num_threads(), kernels.tile_rows,
                                   kernels.panel_columns, gathered});
}

}  // namespace flashu::cpu
