// Epilogues of the FFN; compiled once per CPU instruction set.
#include "cpu/ffn_kernels.hpp"

#include <bit>
#include <type_traits>

#include "cpu/simd.hpp"

namespace flashu::cpu::FLASHU_ISA {
namespace {

constexpr int kColumns = 2 * kWidth;

void swiglu(float* c, int64_t rows) {
  for (int64_t r = 0; r < rows; ++r) {
    float* row = c + r * kColumns;
    store(row, silu(load(row)) * load(row + kWidth));
  }
}

template <class T>
void add(float* c, const void* added, int64_t stride, int64_t rows, int64_t count) {
  for (int64_t r = 0; r < rows; ++r) {
    const T* const from = static_cast<const T*>(added) + r * stride;
    for (int64_t j = 0; j < count; ++j) c[r * kColumns + j] += to_float(from[j]);
  }
}

void add_squares(double* sums, const float* c, int64_t rows, int64_t count) {
  for (int64_t r = 0; r < rows; ++r) {
    for (int64_t j = 0; j < count; ++j) {
      const double value = c[r * kColumns + j];
      sums[j] += value * value;
    }
  }
}

void pack_float_tile(float* out, const float* c, int64_t rows, int64_t count) {
  const int64_t tile_rows = gemm_kernels.tile_rows;
  for (int64_t j = 0; j < count; ++j) {
    for (int64_t r = 0; r < tile_rows; ++r) out[j * tile_rows + r] = r < rows ? c[r * kColumns + j] : 0.0f;
  }
}

template <class T>
void pack_tile(float* out, const float* c, int64_t rows, int64_t count) {
#if defined(__AVX512BF16__)
  if constexpr (std::is_same_v<T, bfloat16>) {
    const int64_t tile_rows = gemm_kernels.tile_rows;
    for (int64_t j = 0; j < count; j += 2) {
      for (int64_t r = 0; r < tile_rows; ++r) {
        const float* pair = c + r * kColumns + j;
        const uint32_t low = r < rows ? from_float<bfloat16>(pair[0]).bits : 0;
        const uint32_t high = r < rows && j + 1 < count ? from_float<bfloat16>(pair[1]).bits : 0;
        out[j / 2 * tile_rows + r] = std::bit_cast<float>(high << 16 | low);
      }
    }
    return;
  }
#endif
  pack_float_tile(out, c, rows, count);
}

}  // namespace

extern const FfnKernels ffn_kernels{swiglu,
                                    {add<float>, add<bfloat16>, add<float16>},
                                    add_squares,
                                    {pack_tile<float>, pack_tile<bfloat16>, pack_tile<float16>}};

}  // namespace flashu::cpu::FLASHU_ISA
