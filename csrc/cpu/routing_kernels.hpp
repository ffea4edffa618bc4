// Kernel table of the routing family: sums over one row, in double, so that scores of near-equal vectors keep
// their order; one table per storage type and CPU instruction set.
#pragma once

#include <cstdint>

#include "core/half.hpp"
#include "core/isa.hpp"

namespace flashu::cpu {

struct DotAndSquares {
  double dot;
  double a_squares;
  double b_squares;
};

template <class T>
struct RoutingKernels {
  DotAndSquares (*dot_and_squares)(const T* a, const T* b, int64_t n);
  double (*sum_squares)(const T* x, int64_t n);
};

FLASHU_DECLARE_ISA(RoutingKernels<float>, routing_f32)
FLASHU_DECLARE_ISA(RoutingKernels<bfloat16>, routing_bf16)
FLASHU_DECLARE_ISA(RoutingKernels<float16>, routing_f16)

}  // namespace flashu::cpu
