// Bias and activation in a kernel. Kernels of the FFN have none of it; those that do are instances of their
// own.
#pragma once

#include "cuda/epilogue.hpp"
#include "cuda/ffn_gemm.cuh"

namespace flashu::cuda {

// A kernel's configuration with an epilogue.
template <class C>
struct Finished : C {
  static constexpr bool kFinishes = true;
};

// x (1 + erf(x / sqrt(2))) / 2. The last product is rounded by itself: a residual is added after it, and two
// kernels that fused the two differently would differ in bits.
FLASHU_DEVICE float gelu(float x) { return __fmul_rn(0.5f * x, 1.0f + erff(x * 0.707106781186547524f)); }

// 2 u of x (1 + tanh(u)) / 2 = x / (1 + e^-2u)
FLASHU_DEVICE float twice_tanh_argument(float x) {
  return x * (1.59576912160573071f + 0.0713548162726002527f * (x * x));
}

// Sums in registers; column(i): of the result, n columns wide, that sum i belongs to.
template <class T, int kCount, class Column>
FLASHU_DEVICE void finish(float (&sums)[kCount], const Epilogue& epilogue, int64_t n, const Column& column) {
  if (epilogue.bias != nullptr) {
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      const int64_t c = column(i);
      if (c < n) sums[i] += to_float(static_cast<const T*>(epilogue.bias)[c]);
    }
  }
  switch (epilogue.kind) {
    case FLASHU_EPILOGUE_GELU:
#pragma unroll
      for (int i = 0; i < kCount; ++i) sums[i] = gelu(sums[i]);
      break;
    case FLASHU_EPILOGUE_GELU_TANH:
#pragma unroll
      for (int i = 0; i < kCount; ++i) sums[i] = times_sigmoid(sums[i], twice_tanh_argument(sums[i]));
      break;
    case FLASHU_EPILOGUE_SILU:
#pragma unroll
      for (int i = 0; i < kCount; ++i) sums[i] = times_sigmoid(sums[i], sums[i]);
      break;
    default:
      break;
  }
}

}  // namespace flashu::cuda
