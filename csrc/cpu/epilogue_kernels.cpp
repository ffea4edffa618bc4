// Bias, activation and store of a product panel; compiled once per CPU instruction set.
#include "cpu/epilogue_kernels.hpp"

#include "cpu/simd.hpp"

namespace flashu::cpu::FLASHU_ISA {
namespace {

constexpr int kColumns = 2 * kWidth;

template <int kEpilogue>
FLASHU_INLINE Floats activation(Floats x) {
  if constexpr (kEpilogue == FLASHU_EPILOGUE_GELU) return gelu(x);
  if constexpr (kEpilogue == FLASHU_EPILOGUE_GELU_TANH) return gelu_tanh(x);
  if constexpr (kEpilogue == FLASHU_EPILOGUE_SILU) return silu(x);
  return x;
}

void scale(float* c, const float* scale, int64_t rows) {
  for (int64_t r = 0; r < rows; ++r) {
    float* row = c + r * kColumns;
    store(row, load(row) * load(scale));
    store(row + kWidth, load(row + kWidth) * load(scale + kWidth));
  }
}

template <int kEpilogue>
void activate(float* c, const float* bias, int64_t rows) {
  const Floats left = bias == nullptr ? Floats{} : load(bias);
  const Floats right = bias == nullptr ? Floats{} : load(bias + kWidth);
  for (int64_t r = 0; r < rows; ++r) {
    float* row = c + r * kColumns;
    store(row, activation<kEpilogue>(load(row) + left));
    store(row + kWidth, activation<kEpilogue>(load(row + kWidth) + right));
  }
}

template <class T>
void store_rows(void* out, int64_t stride, const void* residual, int64_t residual_stride, const float* c,
                int64_t rows, int64_t count) {
  for (int64_t r = 0; r < rows; ++r) {
    T* to = static_cast<T*>(out) + r * stride;
    const T* from = residual == nullptr ? nullptr : static_cast<const T*>(residual) + r * residual_stride;
    const float* row = c + r * kColumns;
    int64_t j = 0;
    for (; j + kWidth <= count; j += kWidth) {
      store(to + j, from == nullptr ? load(row + j) : load(row + j) + load(from + j));
    }
    for (; j < count; ++j) to[j] = from_float<T>(from == nullptr ? row[j] : row[j] + to_float(from[j]));
  }
}

}  // namespace

extern const EpilogueKernels epilogue_kernels{
    scale,
    {activate<FLASHU_EPILOGUE_NONE>, activate<FLASHU_EPILOGUE_GELU>, activate<FLASHU_EPILOGUE_GELU_TANH>,
     activate<FLASHU_EPILOGUE_SILU>},
    {store_rows<float>, store_rows<bfloat16>, store_rows<float16>}};

}  // namespace flashu::cpu::FLASHU_ISA
