// A matrix as kernels are given it.
#pragma once

#include <cstdint>

namespace flashu::core {

// Of the problem's storage type, rows `stride` elements apart; null when absent.
struct Matrix {
  void* data = nullptr;
  int64_t stride = 0;
};

}  // namespace flashu::core
