// Row kernels of the norm family; compiled once per CPU instruction set.
#include "cpu/norm_kernels.hpp"

#include <type_traits>

#include "core/lanes.hpp"

namespace flashu::cpu::FLASHU_ISA {
namespace {

constexpr int kLanes = 8;

template <class T>
using Wide = std::conditional_t<std::is_same_v<T, float>, double, float>;

template <class T>
FLASHU_INLINE Wide<T> widen(T value) {
  return to_float(value);
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
double add_sum_squares(T* residual, const T* x, int64_t n) {
  core::Lanes<double, kLanes> squares{};
  core::for_lanes<kLanes>(n, [&](int64_t j, int i) __attribute__((always_inline)) {
    residual[j] = from_float<T>(to_float(residual[j]) + to_float(x[j]));
    const double value = to_float(residual[j]);
    squares.lane[i] += value * value;
  });
  return squares.total();
}

template <class T>
void scale(T* out, const T* x, const T* weight, double inverse, int64_t n) {
  const auto by = static_cast<Wide<T>>(inverse);
  for (int64_t j = 0; j < n; ++j)
    out[j] = from_float<T>(static_cast<float>(widen(x[j]) * by * widen(weight[j])));
}

template <class T>
void modulate(T* out, const T* x, const T* weight, const T* shift, const T* scale, double inverse,
              int64_t n) {
  const auto by = static_cast<Wide<T>>(inverse);
  for (int64_t j = 0; j < n; ++j) {
    const Wide<T> normed = widen(x[j]) * by * widen(weight[j]);
    out[j] = from_float<T>(static_cast<float>(normed * (1 + widen(scale[j])) + widen(shift[j])));
  }
}

template <class T>
void add(T* residual, const T* y, int64_t n) {
  for (int64_t j = 0; j < n; ++j) residual[j] = from_float<T>(to_float(residual[j]) + to_float(y[j]));
}

template <class T>
void gate_add(T* residual, const T* y, const T* gate, int64_t n) {
  for (int64_t j = 0; j < n; ++j) {
    residual[j] = from_float<T>(static_cast<float>(widen(residual[j]) + widen(gate[j]) * widen(y[j])));
  }
}

template <class T>
void rotate(T* out, const T* x, const T* cos, const T* sin, int64_t half) {
  for (int64_t j = 0; j < half; ++j) {
    const Wide<T> low = widen(x[j]);
    const Wide<T> high = widen(x[j + half]);
    out[j] = from_float<T>(static_cast<float>(low * widen(cos[j]) - high * widen(sin[j])));
    out[j + half] =
        from_float<T>(static_cast<float>(high * widen(cos[j + half]) + low * widen(sin[j + half])));
  }
}

template <class T>
constexpr NormKernels<T> kTable{sum_squares<T>, add_sum_squares<T>, scale<T>, modulate<T>,
                                add<T>,         gate_add<T>,        rotate<T>};

}  // namespace

extern const NormKernels<float> norm_f32 = kTable<float>;
extern const NormKernels<bfloat16> norm_bf16 = kTable<bfloat16>;
extern const NormKernels<float16> norm_f16 = kTable<float16>;

}  // namespace flashu::cpu::FLASHU_ISA
