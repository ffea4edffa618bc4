// What ends a linear layer's sums: bias and activation, before the residual.
#pragma once

#include <cstdint>

#include "flashu/linear.h"

namespace flashu::cuda {

struct Epilogue {
  const void* bias = nullptr;  // [n] of the storage type, or null
  int32_t kind = FLASHU_EPILOGUE_NONE;

  bool finishes() const { return bias != nullptr || kind != FLASHU_EPILOGUE_NONE; }
};

}  // namespace flashu::cuda
