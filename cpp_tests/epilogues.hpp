// Epilogues of the linear layer, in double, for the tests on the CPU and on devices.
#pragma once

#include <cmath>
#include <cstdint>

#include "flashu/linear.h"

namespace flashu::test {

inline constexpr flashu_epilogue kAll[] = {FLASHU_EPILOGUE_NONE, FLASHU_EPILOGUE_GELU,
                                           FLASHU_EPILOGUE_GELU_TANH, FLASHU_EPILOGUE_SILU};

inline double activation(int32_t epilogue, double v) {
  switch (epilogue) {
    case FLASHU_EPILOGUE_GELU:
      return v * std::erfc(-v / std::sqrt(2.0)) / 2;
    case FLASHU_EPILOGUE_GELU_TANH:
      return v * (1 + std::tanh(std::sqrt(2 / std::acos(-1.0)) * (v + 0.044715 * v * v * v))) / 2;
    case FLASHU_EPILOGUE_SILU:
      return v / (1 + std::exp(-v));
    default:
      return v;
  }
}

}  // namespace flashu::test
