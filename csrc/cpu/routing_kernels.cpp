// Row sums of the routing family; compiled once per CPU instruction set.
#include "cpu/routing_kernels.hpp"

#include "core/lanes.hpp"

namespace flashu::cpu::FLASHU_ISA {
namespace {

constexpr int kLanes = 8;

template <class T>
DotAndSquares dot_and_squares(const T* a, const T* b, int64_t n) {
  core::Lanes<double, kLanes> dot{}, a_squares{}, b_squares{};
  core::for_lanes<kLanes>(n, [&](int64_t j, int i) __attribute__((always_inline)) {
    const double x = to_float(a[j]);
    const double y = to_float(b[j]);
    dot.lane[i] += x * y;
    a_squares.lane[i] += x * x;
    b_squares.lane[i] += y * y;
  });
  return {dot.total(), a_squares.total(), b_squares.total()};
}

template <class T>
double sum_squares(const T* x, int64_t n) {
  core::Lanes<double, kLanes> squares{};
  core::for_lanes<kLanes>(n, [&](int64_t j, int i) __attribute__((always_inline)) {
    const double value = to_float(x[j]);
    squares.lane[i] += value * value;
  });
  return squares.total();
}

template <class T>
constexpr RoutingKernels<T> kTable{dot_and_squares<T>, sum_squares<T>};

}  // namespace

extern const RoutingKernels<float> routing_f32 = kTable<float>;
extern const RoutingKernels<bfloat16> routing_bf16 = kTable<bfloat16>;
extern const RoutingKernels<float16> routing_f16 = kTable<float16>;

}  // namespace flashu::cpu::FLASHU_ISA
